"""Schedules: the mixture as a function of the plan step, known before the run.

A schedule is pure: the same step gives the same integer weights on every rank, at any time, so it may
be evaluated ahead of the plan, and a resumed run goes on with it. Between two knots of a linear one the
arithmetic is a product, a sum and `quantize`, which every machine rounds alike.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixloader._core import Streamer
from mixloader.errors import ConfigError, WeightsError
from mixloader.mixture import Weights, as_weights, quantize


@dataclass(frozen=True)
class Schedule:
    """Weights by step, for domains not known yet. Made by `piecewise`, `linear` or `function`."""

    kind: Literal["piecewise", "linear", "function"]
    knots: tuple[tuple[int, Weights], ...] = ()
    call: Callable[[int], Weights] | None = None

    @classmethod
    def piecewise(cls, knots: Mapping[int, Weights]) -> Schedule:
        """Weights that hold from one knot to the next. knots: {step: weights}, the first at step 0."""
        return cls("piecewise", _sorted(knots))

    @classmethod
    def linear(cls, knots: Mapping[int, Weights]) -> Schedule:
        """Weights that move evenly from one knot to the next, and stay at the last. knots: as for `piecewise`."""
        return cls("linear", _sorted(knots))

    @classmethod
    def function(cls, call: Callable[[int], Weights]) -> Schedule:
        """The weights that `call(step)` returns. It must be pure: the loader may ask for any step at any time."""
        if not callable(call):
            raise ConfigError(f"a schedule's function is {call!r}; expected a callable from step to weights")
        return cls("function", call=call)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Schedule:
        """The schedule that `describe` described. Raises ConfigError for anything else."""
        kind = description.get("kind") if isinstance(description, Mapping) else None
        if kind not in ("piecewise", "linear") or set(description) != {"kind", "knots"}:
            raise ConfigError(
                f"{description!r} describes no schedule; expected "
                '{"kind": "piecewise" or "linear", "knots": [[step, weights], ...]}'
            )
        try:
            pairs = [(step, weights) for step, weights in description["knots"]]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the knots of a schedule are [step, weights] pairs: {error}") from error
        knots = dict(pairs)
        if len(knots) != len(pairs):
            raise ConfigError("two knots of a schedule stand at the same step")
        return cls.piecewise(knots) if kind == "piecewise" else cls.linear(knots)

    def describe(self) -> dict[str, Any] | None:
        """A JSON-able description of all that the schedule is; None if it is a function."""
        if self.kind == "function":
            return None
        return {"kind": self.kind, "knots": [[step, _plain(weights)] for step, weights in self.knots]}

    def bind(self, names: Sequence[str]) -> BoundSchedule:
        """The schedule over these domains. Raises WeightsError, naming the step, for weights that do not fit them."""
        return BoundSchedule(self, names)


class BoundSchedule:
    """A schedule over the domains `names`, checked: its knots, or that its function answers the same twice."""

    def __init__(self, schedule: Schedule, names: Sequence[str]):
        self.schedule, self.names = schedule, tuple(names)
        self._steps = [step for step, _ in schedule.knots]
        self._units = [self._checked(step, weights) for step, weights in schedule.knots]
        if schedule.call is not None and not np.array_equal(self.at(0), self.at(0)):
            raise ConfigError("the schedule's function gave two answers for step 0; it must depend on the step alone")

    def at(self, step: int) -> np.ndarray:
        """int64 [D] that sum to WEIGHT_ONE: the weights of plan step `step`, 0 or later."""
        if step < 0:
            raise ValueError(f"a schedule begins at step 0, but was asked for step {step}")
        if self.schedule.call is not None:
            return self._checked(step, self.schedule.call(step))
        last = bisect_right(self._steps, step) - 1
        begin, units = self._steps[last], self._units[last]
        if self.schedule.kind == "piecewise" or step == begin or step > self._steps[-1]:
            return units.copy()
        end = self._steps[last + 1]
        return quantize(units * float(end - step) + self._units[last + 1] * float(step - begin))

    def next_change(self, step: int) -> int | None:
        """The first step after `step` whose weights may differ from those of `step`; None if there is none."""
        if self.schedule.call is not None:
            return step + 1
        if step >= self._steps[-1]:
            return None
        return step + 1 if self.schedule.kind == "linear" else self._steps[bisect_right(self._steps, step)]

    @property
    def digest(self) -> str:
        """Of the schedule; all functions have the same."""
        description = self.schedule.describe()
        if description is None:
            return "function"
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]

    def _checked(self, step: int, weights: Weights) -> np.ndarray:
        try:
            return quantize(as_weights(weights, self.names))
        except WeightsError as error:
            raise WeightsError(f"the schedule at step {step}: {error}") from error


class FollowedSchedule:
    """A schedule that the weights of a core follow: set ahead of the plan, and no further than asked for.

    So what a saved state says of later steps does not depend on how far the schedule was followed.
    step: the core has the weights of that step, and none of later ones but from `ends` on, if that is not None.
    """

    def __init__(self, schedule: BoundSchedule, step: int = 0, ends: int | None = None):
        self._schedule, self._ends = schedule, ends
        self._ahead = schedule.next_change(step)

    def is_over(self, step: int) -> bool:
        return self._ends is not None and step >= self._ends

    def units(self, step: int) -> np.ndarray | None:
        """int64 [D]: the weights of a step that the core was not told of yet; None for one that it knows."""
        ahead = self._ahead is not None and step >= self._ahead and not self.is_over(step)
        return self._schedule.at(step) if ahead else None

    def follow(self, core: Streamer, step: int) -> None:
        """Set the weights of all steps up to `step`."""
        while self._ahead is not None and self._ahead <= step and not self.is_over(self._ahead):
            core.set_weights(self._schedule.at(self._ahead), self._ahead)
            self._ahead = self._schedule.next_change(self._ahead)

    def end(self, core: Streamer, step: int, units: np.ndarray) -> None:
        """Have `units` from `step` on, also where weights were set already."""
        if self.is_over(step):
            return
        later = self._schedule.next_change(step)
        while later is not None and (self._ahead is None or later < self._ahead) and not self.is_over(later):
            core.set_weights(units, later)
            later = self._schedule.next_change(later)
        self._ends = step

    def to_json(self) -> dict[str, Any]:
        """Which schedule, as far as that can be told, and where it ends."""
        return {"is": self._schedule.digest, "ends": self._ends}


def _sorted(knots: Mapping[int, Weights]) -> tuple[tuple[int, Weights], ...]:
    if not isinstance(knots, Mapping):
        raise ConfigError(f"the knots of a schedule are {knots!r}; expected a mapping from step to weights")
    for step in knots:
        if not isinstance(step, (int, np.integer)) or isinstance(step, bool) or not 0 <= step < 1 << 63:
            raise ConfigError(f"a knot of a schedule stands at {step!r}; expected a step, an integer >= 0")
    if 0 not in knots:
        raise ConfigError("a schedule needs a knot at step 0, the weights that it begins with")
    return tuple((int(step), knots[step]) for step in sorted(knots))


def _plain(weights: Weights) -> dict[str, float] | list[float]:
    if isinstance(weights, Mapping):
        return {name: float(weight) for name, weight in weights.items()}
    return [float(weight) for weight in np.asarray(weights)]
