"""The mixture and the domains of a loader that runs: what may change between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixloader.errors import WeightsError
from mixloader.mixture import WEIGHT_ONE, Weights, as_fractions, as_weights, quantize, without
from mixloader.state import append_domains

if TYPE_CHECKING:
    from mixloader._core import Streamer
    from mixloader.engine import Engine
    from mixloader.manifest import Manifest
    from mixloader.observation import DomainTable
    from mixloader.schedule import FollowedSchedule


class LiveMixture:
    """The part of MixLoader that changes weights and domains; what it uses is MixLoader's."""

    manifest: Manifest
    engine: Engine
    table: DomainTable
    removed: tuple[str, ...]
    _core: Streamer
    _drawing: Any
    _schedule: FollowedSchedule | None
    _tokens_before: list[int]
    _drawer: int | None
    world_size: int
    _prior: list[int] | None

    if TYPE_CHECKING:

        @property
        def names(self) -> tuple[str, ...]: ...
        @property
        def step(self) -> int: ...
        def state_dict(self) -> dict[str, Any]: ...
        def _open(self, units: np.ndarray) -> None: ...

    @property
    def units(self) -> np.ndarray:
        """int64 [D], sums to WEIGHT_ONE: the integer weights of `step`."""
        return self.units_at(self.step)

    @property
    def weights(self) -> np.ndarray:
        """float64 [D], sums to 1: the weights of `step`."""
        return as_fractions(self.units)

    @property
    def exhausted(self) -> tuple[str, ...]:
        """Domains that have given all that their limit of epochs allows, up to the last step that is over."""
        cursors = self._core.state()["cursors"]
        return tuple(n for n, c, most in zip(self.names, cursors, self.engine.limits, strict=True) if c >= most)

    @property
    def effective_weights(self) -> np.ndarray:
        """float64 [D], sums to 1: the weights of `step` over the domains that are not exhausted."""
        return as_fractions(quantize(without(self.exhausted, self.weights, self.names)))

    def units_at(self, step: int) -> np.ndarray:
        """int64 [D]: the integer weights that `step`, not yet over, has as things stand."""
        _check_step(step)
        with self._drawing:
            scheduled = None if self._schedule is None else self._schedule.units(step)
            return self._core.weights_at(step) if scheduled is None else scheduled

    def set_weights(self, weights: Weights, step: int | None = None) -> int:
        """Change the mixture from plan step `step` on; by default from the first step not begun.

        weights: as for MixLoader, or int64 [D] that sum to WEIGHT_ONE, which are taken as they are.
        Returns the first step with these weights. Batches read ahead for that step and after are
        dropped and filled anew, so the change is never late. With several ranks every rank makes the same call, and
        one from another thread than draws the batches says the step. A schedule ends at that step. Raises WeightsError
        and changes nothing if the weights are no mixture or the step has begun.
        """
        units = self._units(weights)
        if step is None and self.world_size > 1 and self._drawer not in (None, threading.get_ident()):
            raise WeightsError(
                "set_weights() was called from another thread than draws the batches, on one of several ranks, so the "
                "ranks might take it up at different steps; say from which step on, the same on all: step="
            )
        if step is not None:
            _check_step(step)
        if self._schedule is None:
            return self._core.set_weights(units, step)
        with self._drawing:
            effect = self._core.set_weights(units, step)
            self._schedule.end(self._core, effect, units)
        return effect

    def add_domain(self, name: str, data: Any, weight: float = 0.0) -> int:
        """Append a domain; the others keep 1 - weight of the mixture, also of changes set for later steps.

        data: as in a mapping for Manifest.open. A schedule ends here. Returns the first step that may draw from it:
        the first not begun.
        """
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1:
            raise WeightsError(f"the weight of the new domain {name!r} is {weight!r}; expected a share in [0, 1)")
        self._append(self.manifest.with_domain(name, data))
        return self._reweigh(lambda weights: np.append(weights[:-1] * (1 - weight), weight))

    def remove_domain(self, name: str) -> int:
        """Never draw from a domain again; its weight goes to the others, its number stays. A schedule ends here.

        Returns the first step without it. Raises WeightsError if no other domain has a weight.
        """
        index = self._living(name)
        if not np.delete(self.weights, index).any():
            raise WeightsError(f"domain {name!r} is the only one with a weight; add or weigh another one first")
        left = np.where(np.arange(len(self.names)) == index, 0.0, self.weights)

        def remove(weights: np.ndarray) -> np.ndarray:
            weights = np.where(np.arange(len(weights)) == index, 0.0, weights)
            return weights if weights.any() else left

        step = self._reweigh(remove)
        self.removed = (*self.removed, name)
        return step

    def split_domain(self, name: str, parts: Mapping[str, Sequence[int]]) -> int:
        """Replace a domain by parts, each of some of its shards (by number), which share its weight by their tokens.

        The parts are new domains at the end, and begin an epoch. A schedule ends here. Returns the first step that
        may draw from them.
        """
        index = self._living(name)
        self._append(self.manifest.split(name, parts))
        tokens = np.array([self.manifest.domain(part).tokens for part in parts], dtype=np.float64)

        def split(weights: np.ndarray) -> np.ndarray:
            weights = weights.copy()
            weights[len(weights) - len(tokens) :] = weights[index] * tokens / tokens.sum()
            weights[index] = 0.0
            return weights

        step = self._reweigh(split)
        self.removed = (*self.removed, name)
        return step

    def _living(self, name: str) -> int:
        index = self.names.index(self.manifest.domain(name).name)
        if name in self.removed:
            raise WeightsError(f"domain {name!r} was removed already")
        return index

    def _reweigh(self, change: Callable[[np.ndarray], np.ndarray]) -> int:
        """Change the weights of the first step not begun, and those that were set by hand for later ones."""
        with self._drawing:
            first = self.step
            later = [] if self._schedule is not None else self._core.state()["weights"]
            effect = self.set_weights(change(self.weights))
            for step, _, units in later:
                if step > first:
                    self._core.set_weights(quantize(change(as_fractions(units))), step)
            return effect

    def _append(self, manifest: Manifest) -> None:
        """Go on with the same stream over a manifest with more domains at its end."""
        with self._drawing:
            if self._schedule is not None:
                self.set_weights(self.units)  # which ends it
                self._schedule = None
            state = append_domains(self.state_dict(), manifest.names)
            old, before = self.engine, self.manifest
            self.manifest = manifest
            try:
                self._open(np.array(state["weights"][0][2], dtype=np.int64))
            except BaseException:
                self.manifest = before
                raise
            old.close()
            self._core.load_state(state)
            self._tokens_before = state["tokens_before"]
            self._prior = self.units.tolist()
            self.table = manifest.table(as_fractions(self._prior))

    def _units(self, weights: Weights) -> np.ndarray:
        checked = as_weights(weights, self.names)
        units = quantize(checked)
        if isinstance(weights, np.ndarray) and weights.dtype == np.int64 and checked.sum() == WEIGHT_ONE:
            units = weights
        for name in self.removed:
            if units[self.names.index(name)]:
                raise WeightsError(f"domain {name!r} was removed, and cannot have a weight above zero any more")
        return units


def _check_step(step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step < 1 << 63:
        raise WeightsError(f"step is {step!r}; expected a plan step, an integer of at least 0")
