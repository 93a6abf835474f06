"""Losses as a linear function of the mixture: the yardstick of RegMix (arXiv 2407.01492, table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixloader.fitters.law import as_losses, as_mixtures


@dataclass(frozen=True)
class Linear:
    """loss_f = intercept_f + slopes_f . mixture. intercept: float64 [F], nats. slopes: float64 [F, D]."""

    intercept: np.ndarray
    slopes: np.ndarray
    kl: float = 0.0

    @property
    def n_domains(self) -> int:
        return self.slopes.shape[1]

    @property
    def n_fields(self) -> int:
        return self.slopes.shape[0]

    def predict(self, mixtures: npt.ArrayLike, fields: Sequence[int] | None = None) -> np.ndarray:
        chosen = slice(None) if fields is None else list(fields)
        return self.intercept[chosen] + as_mixtures(mixtures, self.n_domains) @ self.slopes[chosen].T

    def derivatives(self, weights: np.ndarray, target_weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        slope = target_weights @ self.slopes
        return float(target_weights @ self.intercept + slope @ weights), slope, np.zeros((len(slope), len(slope)))


def fit_linear(mixtures: npt.ArrayLike, losses: npt.ArrayLike, *, seed: int = 0) -> Linear:
    """Ordinary least squares with an intercept, of least norm where weights that sum to one leave a freedom.

    mixtures: [N, D], taken as they are, as in the source. losses: [N, F]. seed: not used; there is no chance in it.
    """
    x = as_mixtures(mixtures)
    y = as_losses(losses, len(x))
    solution = np.linalg.lstsq(np.column_stack((np.ones(len(x)), x)), y, rcond=None)[0]
    return Linear(solution[0], solution[1:].T)
