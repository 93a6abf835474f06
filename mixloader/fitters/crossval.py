"""How well a fitter ranks mixtures that it has not seen, from the runs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError
from mixloader.fitters.law import Law, as_losses, as_mixtures


@dataclass(frozen=True)
class Score:
    """settings: of the fitter. spearman: float64 [F], of the losses predicted out of fold. rmse: float64 [F]."""

    settings: Mapping[str, Any]
    spearman: np.ndarray
    rmse: np.ndarray


def spearman(predicted: npt.ArrayLike, real: npt.ArrayLike) -> float:
    """Rank correlation of two arrays [N], ties at their mean rank; NaN if one of them is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (predicted, real)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    return float(centred[0] @ centred[1] / scale) if scale > 0 else float("nan")


def cross_validate(
    fitter: Callable[..., Law],
    mixtures: npt.ArrayLike,
    losses: npt.ArrayLike,
    grid: Sequence[Mapping[str, Any]] = ({},),
    *,
    folds: int = 5,
    seed: int = 0,
) -> Iterator[Score]:
    """A Score for each of the settings in `grid`, as they are done; the folds are the same for all.

    fitter(mixtures [N, D], losses [N, F], seed=..., **settings) -> Law. Raises ConfigError for fewer runs than folds.
    """
    x = as_mixtures(mixtures)
    y = as_losses(losses, len(x))
    if not 2 <= folds <= len(x):
        raise ConfigError(f"folds is {folds}; expected from 2 to the number of runs, {len(x)}")
    order = np.random.default_rng(seed).permutation(len(x))
    for settings in grid:
        predicted = np.empty_like(y)
        for fold in range(folds):
            out = np.zeros(len(x), dtype=bool)
            out[order[fold::folds]] = True
            predicted[out] = fitter(x[~out], y[~out], seed=seed, **settings).predict(x[out])
        yield Score(
            settings,
            np.array([spearman(p, r) for p, r in zip(predicted.T, y.T, strict=True)]),
            np.sqrt(((predicted - y) ** 2).mean(axis=0)),
        )


def best_of(scores: Sequence[Score], target_weights: npt.ArrayLike | None = None) -> Score:
    """The score with the highest mean Spearman, weighted by the sizes of target_weights [F] (default alike)."""
    weights = np.ones(len(scores[0].spearman)) if target_weights is None else np.abs(np.asarray(target_weights))
    return max(scores, key=lambda score: float(np.nan_to_num(score.spearman, nan=-1.0) @ weights))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
