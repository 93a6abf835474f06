"""Offline mixing methods: from the losses of small runs on many mixtures to the mixture of the run that counts.

`fit` a law to runs, `propose` a mixture from it; `sample_mixtures` says which runs to make. One method a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError
from mixloader.fitters.bounds import bounds
from mixloader.fitters.crossval import best_of, cross_validate, spearman
from mixloader.fitters.exponential import fit_mixing_law, fit_olmix
from mixloader.fitters.law import ConvexLaw, Law, as_mixtures
from mixloader.fitters.linear import fit_linear
from mixloader.fitters.mixmin import fit_mixmin
from mixloader.fitters.propose import propose
from mixloader.fitters.regmix import GRID, fit_regmix
from mixloader.fitters.reuse import Reuse
from mixloader.fitters.sample import sample_mixtures

FITTERS: dict[str, Callable[..., Law]] = {
    "regmix": fit_regmix,
    "linear": fit_linear,
    "mixing-law": fit_mixing_law,
    "olmix": fit_olmix,
}
"""By name: (mixtures [N, D], losses [N, F], *, seed, settings of its own) -> Law."""

GRIDS: dict[str, tuple[dict[str, Any], ...]] = {"regmix": GRID}
"""Settings that cross-validation compares; the others have none to choose."""


def fit(method: str, mixtures: npt.ArrayLike, losses: npt.ArrayLike, *, seed: int = 0, **settings: Any) -> Law:
    """Fit a method in FITTERS to runs: mixtures [N, D] that sum to 1 within 0.01, losses [N, F].

    Returns a Law: `predict(mixtures) -> [M, F]`, and what `propose` takes. The same seed gives the same law. MixMin has
    no runs; see `fit_mixmin`. Raises ConfigError for an unknown method or setting, for arrays that do not fit, and for
    a domain that no run has read, of which no law can know anything.
    """
    if method not in FITTERS:
        raise ConfigError(f"unknown method {method!r}; known methods are {', '.join(FITTERS)}")
    unread = np.flatnonzero(~as_mixtures(mixtures).any(axis=0))
    if len(unread):
        raise ConfigError(f"domain {unread[0]} has weight zero in every run; leave it out, or make a run that reads it")
    try:
        return FITTERS[method](mixtures, losses, seed=seed, **settings)
    except TypeError as error:
        raise ConfigError(f"method {method!r} cannot be fitted with settings {settings}: {error}") from error


__all__ = [
    "FITTERS",
    "GRIDS",
    "ConvexLaw",
    "Law",
    "Reuse",
    "best_of",
    "bounds",
    "cross_validate",
    "fit",
    "fit_mixmin",
    "propose",
    "sample_mixtures",
    "spearman",
]
