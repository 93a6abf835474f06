"""Losses that fall exponentially with the weights: data mixing laws, and Olmix's log-linear law.

Data mixing laws (Ye et al., arXiv 2403.16952, equation 7): L_f(w) = c_f + k_f exp(t_f . w).
Olmix (arXiv 2602.12237; olmix/fit/utils.py, mixing_law): L_f(w) = exp(c_f) + exp(t_f . w), best mixture by
min sum_f a_f L_f(w) + kl KL(w || prior) with w_d <= tokens_d repetition / target_tokens.

Weights sum to one, so k exp(t . w) is exp((t + log k) . w): the two differ in that Olmix's floor of the loss is
positive, and in the delta of the Huber loss (0.02 there, 0.01 in yegcjs/mixinglaws law.py). Rows are divided by their
sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError
from mixloader.fitters.law import as_losses, as_mixtures

_LARGEST_EXPONENT = 30.0  # a step may look far away; losses there are wrong enough
_STEPS = 1000
_MOST_DAMPING = 1e12


@dataclass(frozen=True)
class Exponential:
    """loss_f = offset_f + exp(exponents_f . mixture). offset: float64 [F], nats. exponents: float64 [F, D]."""

    offset: np.ndarray
    exponents: np.ndarray
    kl: float = 0.0

    @property
    def n_domains(self) -> int:
        return self.exponents.shape[1]

    @property
    def n_fields(self) -> int:
        return self.exponents.shape[0]

    def predict(self, mixtures: npt.ArrayLike, fields: Sequence[int] | None = None) -> np.ndarray:
        chosen = slice(None) if fields is None else list(fields)
        x = as_mixtures(mixtures, self.n_domains)
        x = x / x.sum(axis=1, keepdims=True)
        return self.offset[chosen] + np.exp(np.minimum(x @ self.exponents[chosen].T, _LARGEST_EXPONENT))

    def derivatives(self, weights: np.ndarray, target_weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        scaled = target_weights * np.exp(np.minimum(self.exponents @ weights, _LARGEST_EXPONENT))
        value = float(target_weights @ self.offset + scaled.sum())
        return value, scaled @ self.exponents, (self.exponents.T * scaled) @ self.exponents


def fit_mixing_law(
    mixtures: npt.ArrayLike, losses: npt.ArrayLike, *, delta: float = 0.01, starts: int = 10, seed: int = 0
) -> Exponential:
    """Data mixing laws: an offset of any sign, no KL term. Parameters as in `fit_olmix`."""
    return _fit(mixtures, losses, delta, starts, seed, positive=False, kl=0.0)


def fit_olmix(
    mixtures: npt.ArrayLike, losses: npt.ArrayLike, *, delta: float = 0.02, starts: int = 10, seed: int = 0
) -> Exponential:
    """Olmix's log-linear law: an offset above zero, a KL term of 0.05 in proposals.

    mixtures: [N, D]. losses: [N, F], above zero; at least 3 (D + 1) runs is Olmix's advice.
    delta: where the Huber loss turns from squared to absolute, in units of the losses.
    starts: the best of so many fits. The source takes 300 of L-BFGS in float32, begun around exp(t . w) = 1 whatever
    the losses; here offsets are spread below the least loss and the exponents begin at its level.
    Raises ConfigError for losses that are not above zero.
    """
    return _fit(mixtures, losses, delta, starts, seed, positive=True, kl=0.05)


def _fit(
    mixtures: npt.ArrayLike,
    losses: npt.ArrayLike,
    delta: float,
    starts: int,
    seed: int,
    *,
    positive: bool,
    kl: float,
) -> Exponential:
    x = as_mixtures(mixtures)
    x = x / x.sum(axis=1, keepdims=True)
    y = as_losses(losses, len(x))
    if delta <= 0 or starts < 1:
        raise ConfigError(f"delta is {delta} and starts {starts}; expected delta above 0 and at least one start")
    if positive and y.min() <= 0:
        raise ConfigError(
            f"a loss is {y.min():g}, but Olmix's law has only losses above zero; fit 'mixing-law', or a positive metric"
        )
    fits = [
        _fit_field(x, y[:, f], delta, starts, np.random.default_rng((seed, f)), positive) for f in range(y.shape[1])
    ]
    return Exponential(np.array([offset for offset, _ in fits]), np.stack([exponents for _, exponents in fits]), kl)


def _fit_field(
    x: np.ndarray, y: np.ndarray, delta: float, starts: int, rng: np.random.Generator, positive: bool
) -> tuple[float, np.ndarray]:
    """Offset and exponents [D] of one loss y [N]: the best of several starts."""
    spread = max(float(np.ptp(y)), 1e-3 * abs(float(y.mean())), 1e-9)
    best, least = np.zeros(1 + x.shape[1]), np.inf
    for below in np.geomspace(0.02, 5.0, starts):
        offset = float(y.min()) - below * spread
        if positive:
            offset = max(offset, 0.02 * float(y.min()) / (1 + below))
        level = np.log(float(y.mean()) - offset)
        first = np.log(offset) if positive else offset
        start = np.concatenate(([first], level + rng.normal(0.0, 0.3, x.shape[1])))
        found, huber = _descend(x, y, delta, start, positive)
        if huber < least:
            best, least = found, huber
    offset = _offset(best, positive)
    # Of a domain that no run has read (in a fold, say) nothing is known: it predicts the mean loss.
    return offset, np.where(x.any(axis=0), best[1:], np.log(max(float(y.mean()) - offset, 1e-9)))


def _descend(x: np.ndarray, y: np.ndarray, delta: float, start: np.ndarray, positive: bool) -> tuple[np.ndarray, float]:
    """Levenberg-Marquardt steps on least squares reweighted to the Huber loss. Returns parameters and that loss.

    (Measured on RegMix's runs: about 80 steps where L-BFGS takes over 1,000.)
    """
    parameters, damping = start, 1e-3
    residual, rise = _residual(parameters, x, y, positive)
    huber = _huber(residual, delta)
    for _ in range(_STEPS):
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        by_first = _offset(parameters, positive) if positive else 1.0
        jacobian = np.column_stack((np.full(len(y), by_first), rise[:, None] * x))
        curvature = (jacobian * weight[:, None]).T @ jacobian
        slope = jacobian.T @ (weight * residual)
        scale = np.diag(np.diag(curvature) + 1e-12)
        while damping < _MOST_DAMPING:
            trial = parameters - np.linalg.solve(curvature + damping * scale, slope)
            trial_residual, trial_rise = _residual(trial, x, y, positive)
            trial_huber = _huber(trial_residual, delta)
            if trial_huber <= huber:
                break
            damping *= 4
        else:
            break  # no step lowers it
        gained = huber - trial_huber
        parameters, residual, rise, huber = trial, trial_residual, trial_rise, trial_huber
        damping = max(damping / 5, 1e-12)
        if gained <= 1e-10 * huber:
            break
    return parameters, huber


def _residual(parameters: np.ndarray, x: np.ndarray, y: np.ndarray, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Predicted less real, and the exponential part of the prediction, float64 [N] each."""
    rise = np.exp(np.minimum(x @ parameters[1:], _LARGEST_EXPONENT))
    return _offset(parameters, positive) + rise - y, rise


def _huber(residual: np.ndarray, delta: float) -> float:
    size = np.abs(residual)
    return float(np.where(size < delta, size**2 / 2, delta * (size - delta / 2)).sum())


def _offset(parameters: np.ndarray, positive: bool) -> float:
    return float(np.exp(min(parameters[0], _LARGEST_EXPONENT)) if positive else parameters[0])
