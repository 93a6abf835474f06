"""MixMin (Thudi et al., arXiv 2502.10510): the mixture of one small model per domain that explains a target best.

Equation 4: minimise -mean_i log(sum_d w_d P_d(x_i)) / length_i over mixtures w, where P_d(x_i) is the probability
that the model trained on domain d alone gives the target text x_i. It is convex. The source descends it by
exponentiated gradient with a fixed rate of 1 for 100 steps and stops when every entry of the gradient is under 1e-4,
which cannot happen: the inner product of weights and gradient is -mean 1/length. Here the same function goes to the
solver that serves the other convex laws, which ends on a duality gap; sums of probabilities are taken in logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError
from mixloader.fitters.law import as_mixtures

_LARGEST_RATIO = 300.0  # of probabilities, in logarithm; its square must be finite


@dataclass(frozen=True)
class MixMin:
    """The loss of the mixture of models on each target field, in nats a unit of length (a token, as counted).

    log_probs: for each field float64 [N_f, D], log P_d(x_i) in nats. lengths: for each field float64 [N_f].
    """

    log_probs: tuple[np.ndarray, ...]
    lengths: tuple[np.ndarray, ...]
    kl: float = 0.0

    @property
    def n_domains(self) -> int:
        return self.log_probs[0].shape[1]

    @property
    def n_fields(self) -> int:
        return len(self.log_probs)

    def predict(self, mixtures: npt.ArrayLike, fields: Sequence[int] | None = None) -> np.ndarray:
        x = as_mixtures(mixtures, self.n_domains)
        chosen = range(self.n_fields) if fields is None else fields
        return np.array([[-np.mean(_log_mixed(self.log_probs[f], w) / self.lengths[f]) for f in chosen] for w in x])

    def derivatives(self, weights: np.ndarray, target_weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, gradient, hessian = 0.0, np.zeros(self.n_domains), np.zeros((self.n_domains, self.n_domains))
        for scale, log_probs, lengths in zip(target_weights, self.log_probs, self.lengths, strict=True):
            mixed = _log_mixed(log_probs, weights)
            ratio = np.exp(np.minimum(log_probs - mixed[:, None], _LARGEST_RATIO))
            share = scale / (lengths * len(lengths))
            value -= float(share @ mixed)
            gradient -= share @ ratio
            hessian += (ratio.T * share) @ ratio
        return value, gradient, hessian


def fit_mixmin(
    log_probs: npt.ArrayLike, lengths: npt.ArrayLike | None = None, *, fields: npt.ArrayLike | None = None
) -> MixMin:
    """The law of MixMin; there is nothing to fit, the models have been trained. `propose` finds its mixture.

    log_probs: [N, D], of N target texts under the models of D domains, nats, finite.
    lengths: [N], what each is divided by (its tokens); default 1. fields: int [N], which field each text is of, from
    0 without gaps; default one field. Raises ConfigError for anything else.
    """
    probs = np.asarray(log_probs, dtype=np.float64)
    if probs.ndim != 2 or not probs.size or not np.isfinite(probs).all():
        raise ConfigError(
            f"log-probabilities have shape {list(probs.shape)}; expected finite numbers [N, D], texts by models"
        )
    size = np.ones(len(probs)) if lengths is None else np.asarray(lengths, dtype=np.float64)
    of = np.zeros(len(probs), dtype=np.int64) if fields is None else np.asarray(fields)
    if size.shape != (len(probs),) or not (np.isfinite(size) & (size > 0)).all():
        raise ConfigError(f"lengths have shape {list(size.shape)}; expected [{len(probs)}] finite numbers above 0")
    if of.shape != (len(probs),) or of.dtype.kind not in "iu" or set(of) != set(range(int(of.max()) + 1)):
        raise ConfigError(f"fields have shape {list(of.shape)}; expected integers [{len(probs)}] from 0 without gaps")
    members = [of == field for field in range(int(of.max()) + 1)]
    return MixMin(tuple(probs[m] for m in members), tuple(size[m] for m in members))


def _log_mixed(log_probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log sum_d w_d P_d(x_i), float64 [N]."""
    log_weights = np.log(np.maximum(weights, 1e-300))
    joint = log_probs + log_weights
    top = joint.max(axis=1)
    return top + np.log(np.exp(joint - top[:, None]).sum(axis=1))
