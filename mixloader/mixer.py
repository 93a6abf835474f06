"""Mixer: closes the loop from the losses of a training step to the mixture of a later one.

The clock is strict: statistics of plan steps up to s decide the weights of step s + 1 + lag, never
earlier, never later. Nothing that reaches the weights, the state or the record depends on timing.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mixloader.decision import Decider, Decision, Pending, Task
from mixloader.errors import ConfigError, MixLoaderError, RankError, StateError
from mixloader.guards import Guards
from mixloader.influence import Influence
from mixloader.loader import MixLoader
from mixloader.mixer_domains import MixerDomains
from mixloader.mixer_state import MixerState
from mixloader.mixture import quantize, without
from mixloader.objective import Objective
from mixloader.policies import Policy, make_policy
from mixloader.ranks import Ranks, run_facts
from mixloader.runlog import RunLog, make_header
from mixloader.signals import ObservationBuilder
from mixloader.stats import MAX_TOKENS, DomainStats, StatsSnapshot

_SCHEDULED_SKIP = 100_000  # steps, each of which is looked at


class Mixer(MixerDomains, MixerState):
    """Lets a policy set the mixture of a loader while a model trains on its batches.

    Give `stats` to domain_cross_entropy, and call step() once after each optimizer step.

    policy: "agent", "natural", "uniform", "fixed", "fields", another registered name, or a Policy;
        policy_options go to one made by name. It decides in a thread of its own.
    decide_every: a decision is made after every so many plan steps, counted from step 0.
    lag: statistics of steps up to s decide the weights of step s + 1 + lag. With 0 the caller waits
        for the policy at each decision; otherwise only for one that takes longer than `lag` steps.
    token_budget: tokens of the whole run; by default those of the loader's max_steps, if it has any.
    device: where the logits are. record: path of the run record (docs/record.md), begun at the first
        step and continued by load_state_dict; by default none is kept.
    influence: an Influence on the model, for policies that need it; the Mixer drives it from step to step and closes
        it. Its state is saved apart (influence.state_dict()), as it is tensors.
    act: "sampling", or "objective": the loader's mixture stays as it is, and what the policy decides is told by
        `domain_weights`, at the same steps; hand these to domain_cross_entropy (objective.py).
    guards: bounds on the weights and on the time of the policy (guards.py).
    record_detail: the record has all that the policy saw, for learning from it (docs/record.md).
    group: the process group of the loader's ranks; by default all processes, or those of the loader's mesh. Each rank
        has a Mixer with the same arguments and makes the same calls, but for feedback(); rank 0 has the policy and the
        record (docs/distributed.md).

    A change by hand (loader.set_weights) holds against decisions that did not know of it. A policy
    that raises or returns no mixture costs a warning and an event in the record: the weights stay.
    Raises ConfigError, or what the policy's reset raises, before anything is changed; RankError if ranks differ.
    """

    def __init__(
        self,
        loader: MixLoader,
        policy: str | Policy = "agent",
        *,
        decide_every: int = 1,
        lag: int = 1,
        token_budget: int | None = None,
        device: torch.device | str = "cpu",
        record: str | Path | None = None,
        influence: Influence | None = None,
        act: str = "sampling",
        guards: Guards | None = None,
        record_detail: bool = False,
        group: dist.ProcessGroup | None = None,
        **policy_options: Any,
    ):
        self.loader, self.decide_every, self.lag = loader, decide_every, lag
        if token_budget is None and loader.max_steps:
            token_budget = loader.max_steps * loader.global_batch * loader.seq_len
        self.token_budget = token_budget
        self._policy = {"name": policy if isinstance(policy, str) else type(policy).__name__, "options": policy_options}
        self.policy: Policy | None = None
        """On the rank that leads."""
        self.influence = influence
        self.ranks = Ranks.of(loader, torch.device(device), group)
        try:
            self.ranks.agree(lambda: self._checked(policy, act, guards), "in what they begin with")
            self._begin(torch.device(device), record, act, guards, record_detail)
        except BaseException:
            self.ranks.close()
            raise

    def _checked(self, policy: str | Policy, act: str, guards: Guards | None) -> dict[str, Any]:
        """Check the arguments and make the policy, where it is to be; gives what must be the same on all ranks."""
        if act not in ("sampling", "objective"):
            raise ConfigError(f"act is {act!r}; expected 'sampling' or 'objective'")
        if guards is not None:
            guards.bind(self.loader.table)
        counts = {"decide_every": 1, "lag": 0, "token_budget": 1}
        for name, least in counts.items():
            value = getattr(self, name)
            if (name != "token_budget" or value is not None) and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}")
        if self.ranks.leads:
            self.policy = make_policy(policy, **self._policy["options"])
            if "influence" in self.policy.needs and self.influence is None:
                raise ConfigError(
                    "the policy needs the signal 'influence', and this Mixer has none to give it; measure it with "
                    "Mixer(..., influence=Influence(model))"
                )
        if self.influence is not None:
            self.influence.begin_with(self.loader)
        return run_facts(
            self.loader, policy=self._policy, act=act, **{name: getattr(self, name) for name in counts},
            guards=None if guards is None else guards.to_json(),
            influence=None if self.influence is None else self.influence.settings(),
        )  # fmt: skip

    def _begin(
        self, device: torch.device, record: str | Path | None, act: str, guards: Guards | None, detail: bool
    ) -> None:
        loader, influence = self.loader, self.influence
        self.stats = DomainStats(len(loader.names), device, names=loader.names)
        self.stats.influence = influence
        self.waits = 0
        """How often step() found the decision that was due not ready (with lag 0 it always waits: not counted)."""
        self.decision: Decision | None = None
        """The last one that took effect, and what it was made of; None before the first and after a resume."""
        self.on_decision: Callable[[Decision, list[int]], None] | None = None
        """Called with each decision as it takes effect and the integer weights from then on; see trackers.py."""

        self._before_reset = loader.state_dict()
        cursors = np.array(self._before_reset["cursors"], dtype=np.int64)
        builder = ObservationBuilder(
            loader.windows, loader.seq_len, self.token_budget, self._before_reset["step"] - 1, cursors
        )
        self._decider = Decider(self.policy, loader.table, builder, loader.removed, guards, detail, self.ranks)
        self._objective = Objective(loader.units, self.stats.device) if act == "objective" else None
        self._reset_policy()
        self._after_reset = stream = loader.state_dict()
        self._next = stream["step"]  # the plan step that the next step() ends
        self._version = stream["weights_version"]  # of the loader's weights, after our last change
        self._in_force = loader.units_at(self._next).tolist()  # at _next, as far as the record says
        self._reports: dict[str, tuple[float, int]] = {}  # feedback since the last decision
        self._snapshot_every = max(1, MAX_TOKENS // (loader.global_batch * loader.seq_len))
        self._snapshots: list[StatsSnapshot] = []
        self._sums = np.zeros((len(loader.names) + 1, len(DomainStats.COLUMNS)), dtype=np.int64)
        self._pending: deque[Pending] = deque()
        self._warned = self._closed = self._domains_changed = False
        self._exhausted = loader.exhausted
        header = make_header(
            loader, self._next, self._in_force, policy=self._policy, decide_every=self.decide_every, lag=self.lag,
            token_budget=self.token_budget, **({} if influence is None else {"influence": influence.settings()}),
            **({} if self._objective is None else {"act": act, "objective": self._objective.units}),
            **({} if guards is None else {"guards": guards.to_json()}),
        )  # fmt: skip
        self._log = RunLog(record if self.ranks.leads else None, header)

    @property
    def policy_seconds(self) -> float:
        """How long the policy took for the decision that it made last, on the clock of its own thread."""
        return self._decider.policy_seconds

    @property
    def domain_weights(self) -> torch.Tensor | None:
        """float32 [D], the factors of token losses for the batch drawn last; None for a mixer that acts by sampling.

        To be read after a micro-batch is drawn, for domain_cross_entropy(..., domain_weights=...): the weights decided
        for that plan step over those that its rows were drawn with (objective.py). It is one tensor at one address, to
        which each reading writes, until domains are added.
        """
        if self._objective is None:
            return None
        stream = self.loader.state_dict()
        begun = (stream["step"], stream["rows"]) > (self._next, 0)
        units = np.array(_drawn(stream, self._next)) if begun else self.loader.units_at(self._next)
        return self._objective.factors(self._effective(units))

    def step(self) -> None:
        """End a plan step: hand its statistics to the policy, and apply the decision that is due.

        Raises StatsError for bad tokens in the statistics (`lag` steps after they were counted),
        RecordError if the record cannot be written, MixLoaderError if the loader is not at the end of
        the plan step.
        """
        if self._closed:
            raise MixLoaderError("the mixer is closed")
        step, stream = self._next, self.loader.state_dict()
        if len(self.loader.names) != len(self._in_force):
            raise MixLoaderError(
                f"the loader has {len(self.loader.names)} domains now, and the mixer knows of {len(self._in_force)}; "
                "change domains through the mixer: add_domain(), remove_domain(), split_domain()"
            )
        if (stream["step"], stream["rows"]) != (step + 1, 0):
            raise MixLoaderError(
                f"mixer.step() was called to end plan step {step}, but the loader stands {stream['rows']} rows into "
                f"step {stream['step']}; call it once after each optimizer step, when all micro-batches of that step "
                "and none of the next were drawn; steps are left out with mixer.skip()"
            )
        if self.influence is not None:
            self._end_influence(self.influence, step)
        self._next = step + 1
        self._notice_changes(stream)
        if self.loader.rules.exhausted == "redistribute":
            self._notice_exhausted(step)
        drawn = _drawn(stream, step)
        if drawn != self._in_force:
            self._in_force = drawn
            self._log.event("weights", step, weights=drawn)
        if self._next % self.decide_every == 0:
            self._submit(step, stream)
        elif self._next % self._snapshot_every == 0:
            self._snapshots.append(self.stats.snapshot(self.ranks.sums))
        self._collect(self._next)

    def _end_influence(self, influence: Influence, step: int) -> None:
        if influence.step != step:
            raise StateError(
                f"influence stands at plan step {influence.step}, the mixer at {step}; when a run is resumed, load the "
                "state of influence that was saved with the mixer's: mixer.influence.load_state_dict(...)"
            )
        influence.end_step(self.ranks.sums)

    def skip(self, steps: int) -> int:
        """Leave out the next `steps` plan steps of the loader, between step() and the next batch.

        Decisions that take effect in them are waited for, so the stream is the one that the record tells. Returns
        the plan step that comes next.
        """
        self._notice_changes(self.loader.state_dict())
        self._collect(self._next + steps)
        changes = self._changes_until(self._next + steps)
        before, begin = self.loader.cursors, self._next
        self._next = self.loader.skip(steps)
        if self.influence is not None:
            self.influence.at(self._next)
        self._decider.builder.cursors = self._decider.builder.cursors + self.loader.cursors - before
        self._write_changes(changes)
        self._log.event("skip", begin, steps=steps)
        return self._next

    def feedback(self, losses: Mapping[str, float]) -> None:
        """Tell the policy, from its next decision on, what an evaluation found.

        losses: nats a token, lower is better, by name: "source", "target" or a domain's. It may be called on any rank:
        of those that do after the same plan step the mean counts.
        """
        known = {"source", "target", *self.loader.names}
        values = {name: float(value) for name, value in losses.items()}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"feedback for {name!r}; expected 'source', 'target' or a domain's name")
            if not math.isfinite(value):
                raise ConfigError(f"the feedback for {name!r} is {value}; expected a finite number")
        step = self._next - 1
        self._reports.update({name: (value, step) for name, value in values.items()})
        self._log.event("feedback", step, losses=values)

    # The clock

    def _notice_changes(self, stream: Mapping[str, Any]) -> None:
        """If the mixture was changed by hand, decisions under way did not know of it."""
        if stream["weights_version"] != self._version:
            self._version = stream["weights_version"]
            for pending in self._pending:
                pending.stale = pending.stale or self._objective is None

    def _changes_until(self, step: int) -> list[tuple[int, list[int]]]:
        """(step, integer weights) of each step from the next one to before `step` that changes the mixture."""
        if step - self._next > _SCHEDULED_SKIP and self.loader.schedule_digest is not None:
            raise MixLoaderError(
                f"{step - self._next} steps cannot be skipped at once under a schedule; skip at most {_SCHEDULED_SKIP}"
            )
        if self.loader.schedule_digest is not None:
            all_steps = [(at, self.loader.units_at(at).tolist()) for at in range(self._next, step)]
        else:
            all_steps = [(at, units) for at, _, units in self.loader.state_dict()["weights"] if self._next <= at < step]
        return all_steps

    def _write_changes(self, changes: list[tuple[int, list[int]]]) -> None:
        for at, units in changes:
            if units != self._in_force:
                self._in_force = units
                self._log.event("weights", at, weights=units)

    def _notice_exhausted(self, step: int) -> None:
        """A domain that has run out is told once, and policies see and set the mixture of the others."""
        exhausted = self.loader.exhausted
        for name in exhausted:
            if name not in self._exhausted:
                self._log.event("exhausted", step, domain=name)
        self._exhausted = exhausted

    def _submit(self, step: int, stream: Mapping[str, Any]) -> None:
        effect = step + 1 + self.lag
        changes = [] if self._objective is not None else [start for start, _, _ in stream["weights"]]
        units = self.loader.units_at(effect) if self._objective is None else self._objective.units
        # A change by hand between an earlier decision's effect and this one's will have ended the earlier one.
        earlier = [
            pending.future
            for pending in self._pending
            if not pending.stale and not any(pending.effect < start <= effect for start in changes)
        ]
        task = Task(
            step=step,
            effect=effect,
            cursors=np.array(stream["cursors"], dtype=np.int64),
            units=self._effective(units),
            earlier=earlier,
            reports=self._reports,
            sums=self._sums,
            snapshots=[*self._snapshots, self.stats.snapshot(self.ranks.sums)],
            influence=None if self.influence is None else self.influence.snapshot(),
            exhausted=self._exhausted,
            plan={} if self.ranks.alone else {"effect": effect, "acts on": units.tolist(), **stream},
        )
        self._reports = {}
        self._snapshots, self._sums = [], np.zeros_like(self._sums)
        self._pending.append(Pending(effect, self._decider.submit(task)))

    def _effective(self, units: np.ndarray) -> np.ndarray:
        """int64 [D]: integer weights over the domains that have not run out, as the plan will have them."""
        if not self._exhausted or all(
            not unit or name in self._exhausted for name, unit in zip(self.loader.names, units.tolist(), strict=True)
        ):
            return units
        return quantize(without(self._exhausted, units.astype(np.float64), self.loader.names))

    def _collect(self, step: int) -> None:
        """Apply what takes effect at the plan steps up to `step`."""
        while self._pending and self._pending[0].effect <= step:
            pending = self._pending[0]
            self.waits += self.lag > 0 and not pending.future.done()
            try:
                decision = pending.future.result()
            except Exception as error:
                self._pending.popleft()
                if not isinstance(error, RankError):
                    self._log.event("stats_error", self._next - 1, error=str(error))
                raise
            self._pending.popleft()
            self._write_decision(decision, pending.stale, at=self._next - 1, change_loader=True)
            if decision.error is not None and not self._warned and self.ranks.leads:
                self._warned = True
                warnings.warn(
                    f"policy {self._policy['name']!r} failed after plan step {decision.step}: {decision.error}; the "
                    "last weights stay. Later failures are only told in the record",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _write_decision(self, decision: Decision, stale: bool, at: int, change_loader: bool) -> None:
        """Put a decision in force, unless it is stale, and in the record."""
        if decision.units is not None and not stale:
            if self._objective is not None:
                self._objective.units = decision.units
            else:
                if change_loader:
                    self.loader.set_weights(decision.units, step=decision.effect)
                    self._version += 1
                self._in_force = decision.units.tolist()
        self.decision = decision
        objective = None if self._objective is None else self._objective.units
        self._log.decision(decision, self._in_force, at, objective)
        if self.on_decision is not None:
            self.on_decision(decision, self._in_force if objective is None else objective.tolist())

    def _reset_policy(self, goes_on: bool = False) -> None:
        """Begin, or go on, with the table of domains as it is, and with the weights that the policy wants for it."""
        units = self._decider.reset(self.loader.units if self._objective is None else self._objective.units, goes_on)
        if units is not None and self._objective is not None:
            self._objective.units = np.array(units, dtype=np.int64)
        elif units is not None:
            self.loader.set_weights(np.array(units, dtype=np.int64))

    # The end

    def close(self) -> None:
        """Record the decisions still under way (they are not applied), end the policy's thread and the record."""
        self._close(finish=True)

    def __enter__(self) -> Mixer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(finish=kind is None)

    def _close(self, finish: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if finish:
                self._finish()
        finally:
            self._decider.close()
            self.ranks.close()
            self._log.close()
            if self.influence is not None:
                self.influence.close()

    def _finish(self) -> None:
        for pending in self._pending:
            self._write_decision(pending.future.result(), pending.stale, at=self._next, change_loader=False)
        self._log.end(self._next)


def _drawn(stream: Mapping[str, Any], step: int) -> list[int]:
    """The integer weights that plan step `step`, the last one begun, was drawn with."""
    return [units for start, _, units in stream["weights"] if start <= step][-1]
