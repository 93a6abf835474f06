"""Schedules as policies: the mixture as a function of how far the run is, in plan steps or in tokens.

A MixLoader follows a schedule over steps without any policy (`schedule.Schedule`); these are for comparing one with
policies, for knots in tokens, and for a schedule within a run whose other parts something else decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mixloader.errors import ConfigError
from mixloader.mixture import Weights, as_fractions
from mixloader.observation import DomainTable, Observation
from mixloader.policies.base import register
from mixloader.schedule import Schedule


class _Scheduled:
    """Follows a schedule.

    knots: {position: weights}, the first at 0; weights as in `mixture.as_weights`. unit: of the positions, "steps"
    or "tokens". Raises ConfigError for knots that are none, and WeightsError at `reset` for weights that do not fit
    the domains.

    The weights of a position are in force from the first decision that takes effect there: within `decide_every`
    steps. The domains may change in the run as far as the knots, by name, know the new ones.
    """

    needs: frozenset[str] = frozenset()
    kind: Literal["piecewise", "linear"]

    def __init__(self, knots: Mapping[int, Weights], unit: Literal["steps", "tokens"] = "steps"):
        if unit not in ("steps", "tokens"):
            raise ConfigError(f"the unit of a schedule is {unit!r}; expected 'steps' or 'tokens'")
        self.unit = unit
        self._schedule = getattr(Schedule, self.kind)(knots)
        self._position = 0

    def reset(self, domains: DomainTable) -> np.ndarray:
        """The weights of where the run stands: at the beginning, or where it was when the domains changed."""
        self._bound = self._schedule.bind(domains.names)
        return as_fractions(self._bound.at(self._position))

    def decide(self, observation: Observation) -> np.ndarray:
        step = observation.effect_step
        # In tokens, those of the steps before the effect step, each as large as the mean one so far.
        tokens = observation.tokens * step // (observation.step + 1)
        self._position = step if self.unit == "steps" else tokens
        return as_fractions(self._bound.at(self._position))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._position = state["position"]


@register("piecewise")
class Piecewise(_Scheduled):
    __doc__ = "Weights that hold from one knot to the next. " + (_Scheduled.__doc__ or "")
    kind = "piecewise"


@register("linear")
class Linear(_Scheduled):
    __doc__ = "Weights that move evenly from one knot to the next and stay at the last. " + (_Scheduled.__doc__ or "")
    kind = "linear"
