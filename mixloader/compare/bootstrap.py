"""Paired bootstrap over scenarios, then over the seeds in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    differences: Sequence[Sequence[float]], level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The mean difference of two policies, and an interval for it.

    differences: for each scenario those of its seeds, each of two runs that share all but the policy. A draw takes as
    many scenarios as there are, with replacement, and in each as many seeds as it has, with replacement; its value is
    the mean over scenarios of the means over seeds. The interval is between percentiles of the draws (Efron and
    Tibshirani 1993, chapters 8 and 13), which few seeds or scenarios make too narrow: three values give ten means.
    """
    rng = np.random.default_rng(seed)
    values = [np.asarray(own, dtype=np.float64) for own in differences if len(own)]
    n = len(values)
    if not n:
        return Interval(np.nan, np.nan, np.nan)
    # means[b, j, s]: of scenario s, if it is the j-th of draw b.
    means = np.stack([own[rng.integers(len(own), size=(draws, n, len(own)))].mean(axis=2) for own in values], axis=2)
    chosen = rng.integers(n, size=(draws, n, 1))
    drawn = np.take_along_axis(means, chosen, axis=2)[:, :, 0].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([own.mean() for own in values])), float(low), float(high))
