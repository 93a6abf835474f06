"""The least value of a convex function over mixtures within bounds, with a certificate.

A primal interior-point method (Boyd and Vandenberghe, Convex Optimization, 11.3): Newton steps on the function plus a
logarithmic barrier at the bounds, which is lowered until what it may cost is below the tolerance. Exponentiated
gradient, which MixMin's source uses, needs over 10,000 steps on Olmix's problem, whose exponents reach 40; this takes
about 50, of D^3 operations each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixloader.fitters.bounds import project

Derivatives = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]
"""Of weights float64 [D]: value, gradient [D] and Hessian [D, D]."""

_NEWTON_STEPS = 60  # for one height of the barrier; about five are used
_LOWERING = 0.1


@dataclass(frozen=True)
class Minimum:
    """weights: float64 [D]. value: of the function and the KL term. gap: how far above the least it is at most."""

    weights: np.ndarray
    value: float
    gap: float


def minimise(
    derivatives: Derivatives,
    lower: np.ndarray,
    upper: np.ndarray,
    *,
    prior: np.ndarray,
    kl: float = 0.0,
    tolerance: float = 1e-8,
) -> Minimum:
    """Minimise f(w) + kl * KL(w || prior) over mixtures w with lower <= w <= upper, for convex f.

    tolerance: in units of f. The gap that is returned is that of Frank and Wolfe, max over mixtures v within the bounds
    of <gradient, w - v>, which bounds the distance from the least value whatever happened on the way.
    A domain of prior zero gets nothing beyond its floor where kl > 0, for the KL term would be infinite.
    """
    upper = np.where(prior > 0, upper, lower) if kl > 0 else upper
    log_prior = np.log(np.maximum(prior, 1e-300))

    def with_kl(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, gradient, hessian = derivatives(w)
        if kl == 0:
            return value, gradient, hessian
        positive = np.maximum(w, 1e-300)
        excess = np.log(positive) - log_prior
        return value + kl * float(w @ excess), gradient + kl * (excess + 1), hessian + np.diag(kl / positive)

    weights = _inside(lower, upper)
    free = upper - lower > 1e-12
    if free.sum() > 1 and (np.minimum(weights - lower, upper - weights)[free] > 1e-15).all():
        height = max(_gap(with_kl(weights)[1], weights, lower, upper), tolerance) / (2 * free.sum())
        while 2 * free.sum() * height > 0.1 * tolerance:
            height *= _LOWERING
            weights = _centre(with_kl, weights, lower, upper, free, height)
    weights = project(np.log(np.maximum(weights, 1e-300)), lower, upper)
    value, gradient, _ = with_kl(weights)
    return Minimum(weights, value, _gap(gradient, weights, lower, upper))


def kl_divergence(weights: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """KL(weights || prior) in nats over the last axis; infinite where a weight has no prior. 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(weights > 0, weights * np.log(weights / prior), 0.0)
    return terms.sum(axis=-1)


def _inside(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """A mixture as far up between its bounds in every domain."""
    room = (upper - lower).sum()
    return lower + (upper - lower) * min(max((1 - lower.sum()) / room, 0.0), 1.0) if room > 0 else lower.copy()


def _centre(
    derivatives: Derivatives, weights: np.ndarray, lower: np.ndarray, upper: np.ndarray, free: np.ndarray, height: float
) -> np.ndarray:
    """Newton's method on f - height * sum log((w - lower) (upper - w)), keeping the sum of the weights."""

    def barrier(w: np.ndarray) -> float:
        return -height * float(np.log((w - lower)[free]).sum() + np.log((upper - w)[free]).sum())

    value, gradient, hessian = derivatives(weights)
    for _ in range(_NEWTON_STEPS):
        above, below = (weights - lower)[free], (upper - weights)[free]
        slope = gradient[free] - height / above + height / below
        curvature = hessian[np.ix_(free, free)] + np.diag(height / above**2 + height / below**2)
        scale = 1 / np.sqrt(np.diag(curvature))  # the curvatures of domains differ by many orders
        scaled = curvature * scale[:, None] * scale
        solved = scale[:, None] * np.linalg.solve(scaled, np.column_stack((scale * slope, scale)))
        direction = -solved[:, 0] + solved[:, 1] * (solved[:, 0].sum() / solved[:, 1].sum())
        decrement = -float(slope @ direction)
        if decrement <= 1e-2 * height:
            break
        inward = np.where(direction < 0, above, below) / np.maximum(np.abs(direction), 1e-300)
        step = min(1.0, 0.99 * float(inward.min()))
        at = value + barrier(weights)
        while step > 1e-12:
            trial = weights.copy()
            trial[free] += step * direction
            trial_value, trial_gradient, trial_hessian = derivatives(trial)
            if trial_value + barrier(trial) <= at - 0.1 * step * decrement + 1e-14 * abs(at):
                break
            step /= 2
        else:
            break  # nothing to gain that float64 can tell
        weights, value, gradient, hessian = trial, trial_value, trial_gradient, trial_hessian
    return weights


def _gap(slope: np.ndarray, weights: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """<slope, weights - v> for the v within the bounds that makes it greatest: the cheapest domains filled first."""
    order = np.argsort(slope, kind="stable")
    room = (upper - lower)[order]
    before = np.concatenate(([0.0], np.cumsum(room)[:-1]))
    vertex = lower.copy()
    vertex[order] += np.clip(1 - lower.sum() - before, 0.0, room)
    return float(slope @ (weights - vertex))
