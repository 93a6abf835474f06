"""From a law to a mixture: the one whose predicted losses are least, within floors and caps.

Exact: laws that are convex in the mixture are minimised with a certificate, with Olmix's KL term.
By simulation: RegMix draws mixtures around the prior and averages those that the law likes best.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError
from mixloader.fitters.bounds import bounds, project
from mixloader.fitters.interior import kl_divergence, minimise
from mixloader.fitters.law import ConvexLaw, Law

Search = Literal["exact", "simulation"]

_CHUNK = 10_000  # mixtures predicted at a time


def propose(
    law: Law,
    prior: npt.ArrayLike,
    target_weights: npt.ArrayLike | None = None,
    *,
    tokens: npt.ArrayLike | None = None,
    target_tokens: float | None = None,
    repetition: float = 4.0,
    floor: npt.ArrayLike = 0.0,
    cap: npt.ArrayLike = 1.0,
    kl: float | None = None,
    search: Search | None = None,
    draws: int = 100_000,
    best: int = 128,
    strength: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """The mixture, float64 [D] that sums to 1, with the least sum_f target_weights_f loss_f(w) + kl KL(w || prior).

    prior: [D], need not sum to one. target_weights: [F], default alike; divided by the sum of their sizes, so that `kl`
    means the same whatever their scale (Olmix divides the default, but not weights that are given).
    tokens, target_tokens, repetition, floor, cap: as in `bounds.bounds`; every proposal keeps to them.
    kl: default the law's own: 0.05 for Olmix, else 0.
    search: "exact" (default for a convex law with target weights >= 0) or "simulation" (the rest). Simulation, as in
    RegMix's notebook: the mean of the `best` (128) of `draws` (100,000) from Dirichlet(strength * prior). There draws
    know no caps; here those beyond a bound are first moved to the nearest mixture within (`bounds.project`).
    Raises ConfigError for arguments that do not fit the law or each other.
    """
    start = _prior(prior, law.n_domains)
    targets = _targets(target_weights, law.n_fields)
    lower, upper = bounds(
        law.n_domains, tokens=tokens, target_tokens=target_tokens, repetition=repetition, floor=floor, cap=cap
    )
    factor = law.kl if kl is None else kl
    if not 0 <= factor < np.inf:
        raise ConfigError(f"kl is {factor}; expected a finite number >= 0")
    if factor > 0 and np.where(start > 0, upper, lower).sum() < 1 - 1e-12:
        raise ConfigError(
            "a KL term keeps domains whose prior is zero at their floor, and the caps of the others sum to less than "
            "1; give every domain a prior, or set kl to 0"
        )
    convex = isinstance(law, ConvexLaw) and bool((targets >= 0).all())
    search = ("exact" if convex else "simulation") if search is None else search
    if search == "exact":
        if not (isinstance(law, ConvexLaw) and convex):
            raise ConfigError(
                f"the exact search needs a convex law and target weights >= 0; got {type(law).__name__} and "
                f"{targets.tolist()}; use search='simulation'"
            )
        return minimise(lambda w: law.derivatives(w, targets), lower, upper, prior=start, kl=factor).weights
    if search != "simulation":
        raise ConfigError(f"search is {search!r}; expected 'exact' or 'simulation'")
    if not (1 <= best <= draws and 0 < strength < np.inf):
        raise ConfigError(
            f"best is {best}, draws {draws}, strength {strength}; expected 1 <= best <= draws, strength > 0"
        )
    candidates = _draws(start, lower, upper, draws, strength, seed)
    chosen = np.flatnonzero(targets).tolist()
    scores = np.concatenate(
        [law.predict(part, chosen) @ targets[chosen] for part in np.array_split(candidates, -(-draws // _CHUNK))]
    )
    if factor > 0:
        scores = scores + factor * kl_divergence(candidates, start)
    mean = candidates[np.argsort(scores, kind="stable")[:best]].mean(axis=0)
    return project(np.log(np.maximum(mean, 1e-300)), lower, upper)


def _draws(
    prior: np.ndarray, lower: np.ndarray, upper: np.ndarray, draws: int, strength: float, seed: int
) -> np.ndarray:
    """float64 [draws, D] mixtures within the bounds."""
    candidates = np.zeros((draws, len(prior)))
    candidates[:, prior > 0] = np.random.default_rng(seed).dirichlet(strength * prior[prior > 0], draws)
    outside = ((candidates < lower) | (candidates > upper)).any(axis=1)
    candidates[outside] = project(np.log(np.maximum(candidates[outside], 1e-300)), lower, upper)
    return candidates


def _prior(prior: npt.ArrayLike, n_domains: int) -> np.ndarray:
    array = np.asarray(prior, dtype=np.float64)
    if array.shape != (n_domains,) or not (np.isfinite(array) & (array >= 0)).all() or not array.any():
        raise ConfigError(
            f"the prior is {array.tolist()}; expected {n_domains} finite numbers >= 0, one a domain, not all zero"
        )
    return array / array.sum()


def _targets(target_weights: npt.ArrayLike | None, n_fields: int) -> np.ndarray:
    array = np.ones(n_fields) if target_weights is None else np.asarray(target_weights, dtype=np.float64)
    if array.shape != (n_fields,) or not np.isfinite(array).all() or not array.any():
        raise ConfigError(
            f"target weights are {array.tolist()}; expected {n_fields} finite numbers, one a loss, not all zero"
        )
    return array / np.abs(array).sum()
