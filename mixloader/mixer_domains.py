"""The domains of a Mixer that runs: what may change between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixloader.decision import Decider, Pending
from mixloader.influence import Influence
from mixloader.loader import MixLoader
from mixloader.objective import Objective
from mixloader.runlog import RunLog
from mixloader.stats import DomainStats


class MixerDomains:
    """The part of Mixer that adds, removes and splits domains; what it uses is Mixer's."""

    loader: MixLoader
    stats: DomainStats
    influence: Influence | None
    _decider: Decider
    _objective: Objective | None
    _log: RunLog
    _pending: deque[Pending]
    _sums: np.ndarray
    _in_force: list[int]
    _next: int
    _version: int
    _domains_changed: bool

    if TYPE_CHECKING:

        def _check_between_steps(self) -> None: ...
        def _drain(self) -> None: ...
        def _reset_policy(self, goes_on: bool = False) -> None: ...

    def add_domain(self, name: str, data: Any, weight: float = 0.0) -> None:
        """As MixLoader.add_domain, between step() and the next batch.

        The policy goes on with the new table: it forgets what it saw, unless it can do better, as the agent can
        (policies.base.change_domains). `stats` is a new object from here on, with a row for the new domain.
        """
        self._change_domains(lambda: self.loader.add_domain(name, data, weight))

    def remove_domain(self, name: str) -> None:
        """As MixLoader.remove_domain; see add_domain."""
        self._change_domains(lambda: self.loader.remove_domain(name))

    def split_domain(self, name: str, parts: Mapping[str, Sequence[int]]) -> None:
        """As MixLoader.split_domain; see add_domain."""
        self._change_domains(lambda: self.loader.split_domain(name, parts))

    def _change_domains(self, change: Callable[[], int]) -> None:
        """Decisions under way do not know the new domains: they are told in the record, but not applied."""
        self._check_between_steps()
        decided = [pending.future.result() for pending in self._pending]
        self._drain()
        change()
        loader = self.loader
        if self._objective is not None:
            removed = np.array([name in loader.removed for name in loader.names])
            self._objective.grow(loader.units, removed)
        self._decider.change_domains(loader.table, loader.removed, loader.windows)
        self._reset_policy(goes_on=True)
        more = len(loader.names) - len(self._in_force)
        old = self.stats
        self.stats = DomainStats(
            len(loader.names),
            old.device,
            names=loader.names,
            distribution=old.distribution,
            token_bytes=old.token_bytes,
        )
        self.stats.influence = self.influence
        if self.influence is not None:
            self.influence.grow(loader.names)
        self._sums = np.insert(self._sums, [len(self._sums) - 1] * more, 0, axis=0)
        self._pending = deque(Pending.decided(decision.grown(more), stale=True) for decision in decided)
        self._version = loader.state_dict()["weights_version"]
        self._in_force = loader.units_at(self._next).tolist()
        self._domains_changed = True
        self._write_domains()

    def _write_domains(self) -> None:
        loader = self.loader
        self._log.event(
            "domains", self._next, manifest=loader.manifest.fingerprint, domains=list(loader.names),
            fields=list(loader.table.fields), removed=list(loader.removed), weights=self._in_force,
            **({} if self._objective is None else {"objective": self._objective.units}),
        )  # fmt: skip
