"""The state of a Mixer: all that a resumed run needs to decide as the one that was saved."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mixloader.decision import Decider, Decision, Pending
from mixloader.errors import MixLoaderError, StateError
from mixloader.loader import MixLoader
from mixloader.objective import Objective
from mixloader.ranks import Ranks
from mixloader.runlog import RunLog
from mixloader.stats import DomainStats, StatsSnapshot

STATE_VERSION = 1


class MixerState:
    """The part of Mixer that is saved and resumed; what it uses is Mixer's."""

    loader: MixLoader
    stats: DomainStats
    decide_every: int
    lag: int
    _policy: dict[str, Any]
    _decider: Decider
    _objective: Objective | None
    _log: RunLog
    _before_reset: dict[str, Any]
    _after_reset: dict[str, Any]
    _next: int
    _version: int
    _in_force: list[int]
    _reports: dict[str, tuple[float, int]]
    ranks: Ranks
    _snapshots: list[StatsSnapshot]
    _sums: np.ndarray
    _pending: deque[Pending]
    _exhausted: tuple[str, ...]
    _domains_changed: bool

    if TYPE_CHECKING:

        def _notice_changes(self, stream: Mapping[str, Any]) -> None: ...
        def _collect(self, step: int) -> None: ...
        def _write_domains(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to decide as this one; JSON-able, exact, a few KB.

        Waits for the decisions under way, and until the record is on the disk. Save it together with
        the state of the loader, between step() and the next batch. All ranks call it, and get the same.
        """
        self._check_between_steps()
        self._notice_changes(self.loader.state_dict())
        self._collect(self._next)
        self._drain()
        pending = [(p.future.result().to_json(), p.stale) for p in self._pending]
        self._decider.report(self._reports)  # after them, as their thread speaks to other ranks, too
        self._reports = {}
        self._log.flush()
        return {
            "version": STATE_VERSION,
            "domains": list(self.loader.names),
            "decide_every": self.decide_every,
            "lag": self.lag,
            "policy": self._policy["name"],
            **({} if self._objective is None else {"objective": self._objective.units.tolist()}),
            "step": self._next,
            "weights_version": self._version,
            "in_force": self._in_force,
            "domains_changed": self._domains_changed,
            "decider": self._decider.state_dict(),
            "feedback": {name: list(entry) for name, entry in self._decider.feedback.items()},
            "sums": self._sums.tolist(),
            "pending": [{**decision, "stale": stale} for decision, stale in pending],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. The loader's state of the same moment must be loaded, too.

        Goes on with the record of the run. All ranks call it with the same state, which may have been saved on another
        number of them. Raises StateError if the state is of another run or moment, RankError if ranks differ.
        """
        for pending in self._pending:
            pending.future.exception()
        self.ranks.agree(lambda: self._check_state(state), "in the state that they load")
        self._decider.domains = self.loader.table
        self._decider.load_state_dict(state["decider"])
        self._next, self._version = state["step"], state["weights_version"]
        self._in_force = list(state["in_force"])
        if self._objective is not None:
            self._objective.units = np.array(state["objective"], dtype=np.int64)
        self._decider.removed, self._exhausted = self.loader.removed, self.loader.exhausted
        self._domains_changed = state["domains_changed"]
        self._reports = {}
        self._decider.feedback = {name: (value, step) for name, (value, step) in state["feedback"].items()}
        self.stats.snapshot()  # whatever was counted since is not part of the state
        self._snapshots, self._sums = [], np.array(state["sums"], dtype=np.int64)
        self._pending.clear()
        for entry in state["pending"]:
            decision = Decision.from_json({key: value for key, value in entry.items() if key != "stale"})
            self._pending.append(Pending.decided(decision, entry["stale"]))
        self._log.resume(self._next)
        if state["domains_changed"]:
            self._write_domains()  # a resume ends what the record says of this step

    def _check_between_steps(self) -> None:
        step = self.loader.state_dict()["step"]
        if step != self._next:
            raise MixLoaderError(
                f"the loader stands at plan step {step}, but mixer.step() has not ended step {self._next} yet; call it "
                "before saving and before changing domains"
            )

    def _check_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse a state of another run; gives what says which one it is."""
        own = {
            "version": STATE_VERSION,
            "domains": list(self.loader.names),
            "decide_every": self.decide_every,
            "lag": self.lag,
            "policy": self._policy["name"],
        }
        for key, value in own.items():
            if state.get(key) != value:
                raise StateError(
                    f"the mixer state has {key} {state.get(key)!r}; this mixer has {value!r}; resume with the settings "
                    "of the run that saved it"
                )
        if ("objective" in state) != (self._objective is not None):
            acts = {True: "objective", False: "sampling"}
            raise StateError(
                f"the mixer state is of a run with act={acts['objective' in state]!r}; this mixer has the other; "
                "resume with the settings of the run that saved it"
            )
        stream = self.loader.state_dict()
        if stream == self._after_reset and stream["weights_version"] != state["weights_version"]:
            # The loader was resumed before this Mixer was made, which then began a new run on it.
            self.loader.load_state_dict(self._before_reset)
            stream = self._before_reset
        for key in ("step", "weights_version"):
            if stream[key] != state[key]:
                raise StateError(
                    f"the mixer state has {key} {state[key]}, but the loader has {stream[key]}; load the state that "
                    "the loader had when the mixer's was saved"
                )
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
        return {"step": state["step"], "digest of the state": digest}

    def _drain(self) -> None:
        """Add what was counted since the last decision to the sums that the next one is given."""
        self._snapshots.append(self.stats.snapshot(self.ranks.sums))
        with self.ranks.hearing("the statistics since the last decision"):
            self._sums = self._sums + sum(snapshot.wait().sums for snapshot in self._snapshots)
        self._snapshots = []
