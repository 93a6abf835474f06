"""What a fitter returns: a law that predicts the losses of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError


@runtime_checkable
class Law(Protocol):
    """Losses as a function of the mixture."""

    @property
    def n_domains(self) -> int:
        """Weights of a mixture, D."""

    @property
    def n_fields(self) -> int:
        """Losses, F."""

    @property
    def kl(self) -> float:
        """The factor of KL(mixture || prior) in a proposal, where the source of the method has one; else 0."""

    def predict(self, mixtures: npt.ArrayLike, fields: Sequence[int] | None = None) -> np.ndarray:
        """Losses float64 [M, F] of mixtures [M, D]; with `fields`, of those columns alone [M, len(fields)]."""


@runtime_checkable
class ConvexLaw(Law, Protocol):
    """A law whose losses are convex in the mixture, so that the best mixture can be found exactly."""

    def derivatives(self, weights: np.ndarray, target_weights: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Sum over fields of target_weights [F] times the loss of one mixture [D]; its gradient [D], Hessian [D, D]."""


def as_mixtures(mixtures: npt.ArrayLike, n_domains: int | None = None) -> np.ndarray:
    """float64 [N, D], checked. Raises ConfigError unless finite, >= 0 and every row sums to 1 within 0.01.

    Rows are left as they are: files round their weights, and each law says what it makes of the rest.
    """
    array = np.asarray(mixtures, dtype=np.float64)
    if array.ndim != 2 or not array.size or (n_domains is not None and array.shape[1] != n_domains):
        expected = "[N, D]" if n_domains is None else f"[N, {n_domains}]"
        raise ConfigError(f"mixtures have shape {list(array.shape)}; expected {expected}, one mixture a row")
    bad = ~(np.isfinite(array) & (array >= 0)).all(axis=1) | (np.abs(array.sum(axis=1) - 1) > 0.01)
    if bad.any():
        row = int(bad.argmax())
        raise ConfigError(
            f"mixture {row} is {array[row].tolist()}, which sums to {array[row].sum():g}; "
            "expected finite weights >= 0 that sum to 1 within 0.01"
        )
    return array


def as_losses(losses: npt.ArrayLike, n_runs: int) -> np.ndarray:
    """float64 [N, F], checked. One column may come as [N]. Raises ConfigError for another shape, NaN or infinity."""
    array = np.asarray(losses, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] != n_runs or not array.shape[1]:
        raise ConfigError(f"losses have shape {list(array.shape)}; expected [{n_runs}, F], a row for each mixture")
    if not np.isfinite(array).all():
        row = int((~np.isfinite(array)).any(axis=1).argmax())
        raise ConfigError(f"the losses of run {row} are {array[row].tolist()}; expected finite numbers; leave it out")
    return array
