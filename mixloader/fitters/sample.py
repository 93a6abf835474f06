"""Mixtures to train proxies on, spread around a prior.

RegMix (arXiv 2407.01492; mixture_config/synthesize_mixture.py) and, with caps from tokens, Olmix
(olmix/generate/synthesize_mixture.py): Dirichlet draws around the prior at strengths from sparse to dense.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError

_ATTEMPTS = 2_000  # draws for each mixture that is wanted; RegMix makes 100
_BATCH = 1 << 20  # numbers drawn at a time


def sample_mixtures(
    prior: npt.ArrayLike,
    n: int,
    *,
    seed: int = 0,
    temperature: float = 0.5,
    min_strength: float = 0.1,
    max_strength: float = 5.0,
    strengths: int = 15,
    max_usage: float = 15.0,
    cap: npt.ArrayLike = 1.0,
    grid: float = 2e-4,
) -> np.ndarray:
    """n different mixtures, float64 [n, D], each on the grid, summing to 1, within the caps.

    prior: [D] > 0 in proportion to tokens. A mixture is one draw from Dirichlet(s * p) with p = prior^temperature,
    made to sum to one, and s one of `strengths` values spaced evenly in logarithm from min_strength to max_strength.
    max_usage: at most so many times a domain's prior (epochs, for a run of as many tokens as there are).
    cap: [D] or one number, a further limit: tokens * repetition / target_tokens, `bounds.bounds`' second value.
    grid: weights are multiples of it (1 / grid must be whole), and what is smaller becomes zero; Olmix's is 2e-3.
    Draws beyond a limit are rejected, and equal mixtures are kept once. Defaults are RegMix's.

    Unlike there, rounding keeps the sum at one (largest remainders; the source's rows sum to 1 within D * grid / 2) and
    limits are tested after it. Raises ConfigError if the limits leave too few mixtures.
    """
    p = np.asarray(prior, dtype=np.float64)
    if p.ndim != 1 or not len(p) or not (np.isfinite(p) & (p > 0)).all():
        raise ConfigError(f"the prior is {p.tolist()}; expected finite numbers above 0, one a domain")
    units = round(1 / grid) if 0 < grid <= 1 else 0
    if not units or abs(units * grid - 1) > 1e-9:
        raise ConfigError(f"grid is {grid}; expected 1 divided by a whole number, such as 0.001")
    if n < 1 or strengths < 1 or temperature < 0 or not 0 < min_strength <= max_strength or not max_usage > 0:
        raise ConfigError(
            f"n is {n}, strengths {strengths} from {min_strength} to {max_strength}, temperature {temperature}, "
            f"max_usage {max_usage}; expected n and strengths >= 1, strengths in rising order, none below zero"
        )
    p = p / p.sum()
    upper = np.floor(np.minimum(np.minimum(p * max_usage, cap), 1.0) * units + 1e-9).astype(np.int64)
    if upper.sum() < units:
        raise ConfigError(f"the greatest weights allowed sum to {upper.sum() / units:.4g}; raise max_usage or the caps")
    centre = p**temperature / (p**temperature).sum()
    ladder = np.geomspace(min_strength, max_strength, strengths)
    rng = np.random.default_rng(seed)
    found: dict[bytes, np.ndarray] = {}
    batch = max(1, min(n * _ATTEMPTS, _BATCH // len(p)))
    for _ in range(-(-n * _ATTEMPTS // batch)):
        chosen = rng.integers(strengths, size=batch)
        draws = np.empty((batch, len(p)))
        for s in range(strengths):  # one Generator call a strength
            draws[chosen == s] = rng.dirichlet(ladder[s] * centre, int((chosen == s).sum()))
        rounded = _round(np.where(draws < grid, 0.0, draws), units)
        # A row of nothing but crumbs below the grid has no weight left; its sum gives it away.
        for row in rounded[(rounded <= upper).all(axis=1) & (rounded.sum(axis=1) == units)]:
            found.setdefault(row.tobytes(), row)
            if len(found) == n:
                return np.stack(list(found.values())) / units
    raise ConfigError(
        f"found {len(found)} of {n} different mixtures within the caps in {n * _ATTEMPTS:,} draws; "
        "raise max_usage, the caps, or the strengths, which keep draws near the prior"
    )


def _round(mixtures: np.ndarray, units: int) -> np.ndarray:
    """Rows [N, D] to integers that sum to `units`, by largest remainders; zeros stay zero."""
    total = mixtures.sum(axis=1, keepdims=True)
    scaled = mixtures / np.where(total > 0, total, 1.0) * units
    whole = np.floor(scaled + 1e-9)
    missing = units - whole.sum(axis=1, keepdims=True)
    rank = np.argsort(np.argsort(-np.where(mixtures > 0, scaled - whole, -1.0), axis=1, kind="stable"), axis=1)
    return (whole + (rank < missing)).astype(np.int64)
