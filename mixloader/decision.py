"""The policy's side of a Mixer: one thread that turns statistics into observations and those into decisions."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mixloader.deadline import TimedPolicy
from mixloader.errors import ConfigError
from mixloader.guards import Guards
from mixloader.influence_table import InfluenceSnapshot, InfluenceTable
from mixloader.mixture import as_fractions, as_weights, quantize, without
from mixloader.observation import DomainTable, Observation
from mixloader.policies import Policy
from mixloader.policies.base import change_domains
from mixloader.ranks import Ranks, plan_facts
from mixloader.signals import ObservationBuilder, numbers_from_json, numbers_to_json, rows_to_json
from mixloader.stats import StatsSnapshot, StatsTable


@dataclass(frozen=True)
class Decision:
    """What came of the observation after plan step `step`.

    units: int64 [D], integer weights from plan step `effect` on; None keeps the weights there are.
    counts, loss, loss_tokens, all [D], and feedback cover what came since the last decision: rows
    read, nats a token (NaN where nothing was read), tokens with a loss, evaluations.
    tokens: trained on so far. error: what the policy failed with, if it did. influence: [D][F], if it was measured
    since the last decision; None for what is not known. requested: int64 [D], what the policy asked for, where guards
    made `units` something else.
    """

    step: int
    effect: int
    tokens: int
    counts: np.ndarray
    loss: np.ndarray
    loss_tokens: np.ndarray
    feedback: dict[str, float]
    units: np.ndarray | None
    error: str | None
    influence: list[list[float | None]] | None = None
    requested: np.ndarray | None = None
    detail: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {
            **vars(self),
            "counts": self.counts.tolist(),
            "loss": numbers_to_json(self.loss),
            "loss_tokens": self.loss_tokens.tolist(),
            "units": None if self.units is None else self.units.tolist(),
            "requested": None if self.requested is None else self.requested.tolist(),
        }

    def grown(self, more: int) -> Decision:
        """The same for a table with `more` domains at its end, of which nothing is known; its units are void."""
        return replace(
            self,
            counts=np.append(self.counts, np.zeros(more, dtype=np.int64)),
            loss=np.append(self.loss, np.full(more, math.nan)),
            loss_tokens=np.append(self.loss_tokens, np.zeros(more, dtype=np.int64)),
            units=None,
            requested=None,
            influence=None if self.influence is None else self.influence + [[None] * len(self.influence[0])] * more,
            detail=None,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Decision:
        """What to_json gave, back."""
        arrays: dict[str, Any] = {key: np.array(values[key], dtype=np.int64) for key in ("counts", "loss_tokens")}
        for key in ("units", "requested"):
            arrays[key] = None if values.get(key) is None else np.array(values[key], dtype=np.int64)
        return cls(**{**values, **arrays, "loss": numbers_from_json(values["loss"])})


@dataclass(frozen=True)
class Task:
    """What is handed in at the end of plan step `step`.

    effect: the plan step from which the decision holds. cursors: int64 [D], windows drawn so far.
    units: int64 [D], the weights of `effect` as the loader knows them; earlier: decisions under way that
    will have changed them by then. reports: feedback that this rank was given since the last task: by name, the latest
    value and the step it was reported after. sums: int64 [D + 1, columns], of DomainStats; snapshots: to be added to
    them. influence: up to `step`. exhausted: domains that have run out by `step`. plan: the loader's state and what
    else must be the same on all ranks, of which there are several.
    """

    step: int
    effect: int
    cursors: np.ndarray
    units: np.ndarray
    earlier: list[Future[Decision]]
    reports: dict[str, tuple[float, int]]
    sums: np.ndarray
    snapshots: list[StatsSnapshot]
    influence: InfluenceSnapshot | None = None
    exhausted: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Pending:
    """A decision under way. stale: the mixture was changed by hand meanwhile, so it will not be applied."""

    effect: int
    future: Future[Decision]
    stale: bool = False

    @classmethod
    def decided(cls, decision: Decision, stale: bool) -> Pending:
        """A decision that is there already."""
        future: Future[Decision] = Future()
        future.set_result(decision)
        return cls(decision.effect, future, stale)


class Decider:
    """Runs a policy in a thread of its own, one task after the other.

    policy: None on ranks that do not lead, which are told what comes of each task. domains: the policy was reset with
    them. builder: of the observations. removed: names that get no weight. guards: what holds for its weights.
    detail: whether decisions tell all that the policy saw. ranks: on which the same tasks are handed in.

    feedback: by name, the latest value and the step it was reported after, as of the last task.
    """

    def __init__(
        self,
        policy: Policy | None,
        domains: DomainTable,
        builder: ObservationBuilder,
        removed: tuple[str, ...] = (),
        guards: Guards | None = None,
        detail: bool = False,
        ranks: Ranks | None = None,
    ):
        self.detail = detail
        self.domains, self.builder, self.removed, self.guards = domains, builder, removed, guards
        self.policy, self.ranks = policy, Ranks() if ranks is None else ranks
        self.policy_seconds = 0.0
        self.feedback: dict[str, tuple[float, int]] = {}
        if policy is not None and guards is not None and guards.deadline_s is not None:
            self.policy = TimedPolicy(policy, guards.deadline_s)
        self._bounds = None if guards is None else guards.bind(domains, check=False)
        # The executor's thread is no daemon; the interpreter joins it at exit if close() was not called.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mixloader-policy")

    def submit(self, task: Task) -> Future[Decision]:
        """Hand in a task. The future raises what went wrong with the statistics; a failed policy is no error."""
        return self._thread.submit(self.decide, task)

    def change_domains(self, domains: DomainTable, removed: tuple[str, ...], windows: np.ndarray) -> None:
        """Go on with more domains, or fewer that may have a weight; the policy was reset with them. As state_dict."""
        self.domains, self.removed = domains, removed
        self._bounds = None if self.guards is None else self.guards.bind(domains, check=False)
        self.builder.grow(windows)

    def reset(self, before: np.ndarray, goes_on: bool = False) -> list[int] | None:
        """Reset the policy, and give the integer weights to begin with; None to stay with `before`, int64 [D].

        goes_on: in mid-run, with other domains; it may remember what it saw. A collective, as state_dict.
        """
        return self.ranks.told(lambda: self._reset(before, goes_on))

    def _reset(self, before: np.ndarray, goes_on: bool) -> list[int] | None:
        assert self.policy is not None
        weights = change_domains(self.policy, self.domains) if goes_on else self.policy.reset(self.domains)
        if weights is None and self.guards is None:
            return None
        wanted = as_weights(as_fractions(before) if weights is None else weights, self.domains.names)
        wanted = without(self.removed, wanted, self.domains.names)
        units = quantize(wanted if self._bounds is None else self._bounds.bound(wanted, self._closed(())))
        # One unit, 2^-30, may be a matter of rounding.
        return units.tolist() if weights is not None or np.abs(units - before).max() > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """Only while no task is under way, as load_state_dict. JSON-able and exact, the same on all ranks, which all
        call it."""
        return self.ranks.told(self._state)

    def _state(self) -> dict[str, Any]:
        assert self.policy is not None
        return {"policy": self.policy.state_dict(), "signals": self.builder.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.policy is not None:
            self.policy.reset(self.domains)
            self.policy.load_state_dict(state["policy"])
        self.builder.load_state_dict(state["signals"])

    def report(self, reports: Mapping[str, tuple[float, int]]) -> None:
        """Take the feedback that ranks were given, which all call: of each name the latest.

        Where several ranks were given it after the same step, the mean of them counts.
        """
        given: dict[str, list[tuple[float, int]]] = {}
        for of_one in self.ranks.gather(reports).values():
            for name, (value, step) in of_one.items():
                given.setdefault(name, []).append((value, step))
        for name, entries in given.items():
            last = max(step for _, step in entries)
            values = [value for value, step in entries if step == last]
            # The mean of equal numbers may be another one, by rounding.
            self.feedback[name] = (values[0] if len(set(values)) == 1 else math.fsum(values) / len(values), last)

    def close(self) -> None:
        """End the thread, after the tasks that were handed in."""
        self._thread.shutdown(wait=True)
        if isinstance(self.policy, TimedPolicy):
            self.policy.close()

    def decide(self, task: Task) -> Decision:
        """What the thread runs for a task."""
        reported = len(task.reports)
        if not self.ranks.alone:
            alike, reported = self.ranks.alike(task.plan, reported)
            if not alike:
                self.ranks.agree(lambda: plan_facts(task.plan), f"after plan step {task.step}")
        if reported:
            self.report(task.reports)
        # Summed over ranks, so a bad token is an error on all of them.
        with self.ranks.hearing(f"the statistics up to plan step {task.step}"):
            stats = StatsTable(task.sums + sum(snapshot.wait().sums for snapshot in task.snapshots))
            influence = None if task.influence is None else task.influence.wait()
        if self.ranks.alone:
            return self._answer(task, stats, influence)
        return Decision.from_json(self.ranks.told(lambda: self._answer(task, stats, influence).to_json()))

    def _answer(self, task: Task, stats: StatsTable, influence: InfluenceTable | None) -> Decision:
        assert self.policy is not None
        before, cursors_before = self.builder.step, self.builder.cursors
        in_force = _in_force(task)
        observation = self.builder.build(
            task.step, task.effect, task.cursors, in_force, stats, self.feedback, influence
        )
        units, requested, error = None, None, None
        new = observation.loss.age == 0
        loss, loss_tokens = np.where(new, observation.loss.value, math.nan), np.where(new, observation.loss.count, 0)
        try:
            if "excess" in self.policy.needs and observation.excess is None and before >= 0:
                # Not after the first steps: a run may begin at its reference.
                raise ConfigError(
                    "the policy needs the excess over a reference, and no reference losses were given; pass "
                    "reference_losses=... to domain_cross_entropy (mixloader.scorer.Reference gives them)"
                )
            begin = time.perf_counter()
            answer = self.policy.decide(observation)
            self.policy_seconds = time.perf_counter() - begin
            if answer is not None:
                units, requested = self._guarded(answer, in_force, observation.tokens_since, task.exhausted)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"[:300]
        measured = influence is not None and influence.latest > before
        return Decision(
            step=task.step,
            effect=task.effect,
            tokens=observation.tokens,
            counts=task.cursors - cursors_before,
            loss=loss,
            loss_tokens=loss_tokens,
            feedback={name: value for name, (value, step) in self.feedback.items() if step >= before},
            units=units,
            error=error,
            influence=rows_to_json(influence.value) if influence is not None and measured else None,
            requested=requested,
            detail=_detail(observation, new, influence if measured else None) if self.detail else None,
        )

    def _guarded(
        self, answer: Any, in_force: np.ndarray, tokens_since: int, exhausted: tuple[str, ...]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Integer weights [D] for the answer of a policy, and those that it asked for if they are others."""
        names = self.domains.names
        weights = without(self.removed, as_weights(answer, names), names)
        asked = quantize(weights)
        if self._bounds is None:
            return asked, None
        bounded = self._bounds.apply(weights, as_fractions(in_force), tokens_since, self._closed(exhausted))
        units = quantize(bounded)
        # One unit, 2^-30, may be a matter of rounding.
        return (units, asked) if np.abs(units - asked).max() > 1 else (asked, None)

    def _closed(self, exhausted: tuple[str, ...]) -> np.ndarray | None:
        """bool [D]: domains that get nothing; None for none, or if there is no other."""
        closed = np.array([name in self.removed or name in exhausted for name in self.domains.names])
        return closed if closed.any() and not closed.all() else None


def _detail(observation: Observation, new: np.ndarray, influence: InfluenceTable | None) -> dict[str, Any]:
    """What of an observation the other keys of a decision do not tell. new: bool [D], whose loss is. JSON-able."""
    detail: dict[str, Any] = {"loss_std": numbers_to_json(np.where(new, observation.loss_std, math.nan))}
    if influence is not None:
        detail |= {
            "influence_std": rows_to_json(influence.std),
            "influence_rows": np.nan_to_num(np.round(influence.rows)).astype(np.int64).tolist(),
            "influence_step": influence.step.tolist(),
            "probe_step": influence.probe_step.tolist(),
        }
    return detail


def _in_force(task: Task) -> np.ndarray:
    """int64 [D]: the weights that the effect step has unless this task's decision changes them."""
    for future in reversed(task.earlier):
        # Earlier tasks are done: there is one thread. One without statistics has decided nothing.
        if future.exception() is None and (units := future.result().units) is not None:
            return units
    return task.units
