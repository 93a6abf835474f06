"""What a proposed mixture may be: a floor and a cap for each domain, and the nearest mixture within them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mixloader.errors import ConfigError

_UNDERFLOW = 700.0  # exp(-700) is still a normal float64


def bounds(
    n_domains: int,
    *,
    tokens: npt.ArrayLike | None = None,
    target_tokens: float | None = None,
    repetition: float = 4.0,
    floor: npt.ArrayLike = 0.0,
    cap: npt.ArrayLike = 1.0,
    names: Sequence[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest weight of each domain, float64 [D] each.

    The greatest is the least of `cap`, 1 and, with `tokens` [D] (distinct tokens of each domain) and `target_tokens`
    (length of the run to come), tokens * repetition / target_tokens: no domain is read more than `repetition` times
    (default 4, as in Olmix). floor, cap: one number, or one a domain.
    Raises ConfigError for values out of range, a floor above its cap, and bounds that no mixture meets.
    """
    names = [f"domain {d}" for d in range(n_domains)] if names is None else names
    lower = _one_a_domain("the floor", floor, names)
    upper = np.minimum(_one_a_domain("the cap", cap, names), 1.0)
    if (tokens is None) != (target_tokens is None):
        raise ConfigError(
            "a limit on repetition needs both the tokens of each domain and the tokens of the run to come; "
            f"only {'the second' if tokens is None else 'the first'} is given"
        )
    if tokens is not None and target_tokens is not None:
        if not (0 < target_tokens < np.inf and 0 < repetition < np.inf):
            raise ConfigError(
                f"target_tokens is {target_tokens} and repetition {repetition}; expected finite numbers above 0"
            )
        upper = np.minimum(upper, _one_a_domain("the number of tokens", tokens, names) * repetition / target_tokens)
    above = lower > upper
    if above.any():
        d = int(above.argmax())
        raise ConfigError(
            f"the floor of {names[d]} is {lower[d]:g}, above its cap of {upper[d]:g}; lower the floor or raise the cap"
        )
    if upper.sum() < 1 - 1e-12:
        raise ConfigError(
            f"the caps sum to {upper.sum():.4g}, so no mixture meets them; allow more repetition or plan fewer tokens"
        )
    if lower.sum() > 1 + 1e-12:
        raise ConfigError(f"the floors sum to {lower.sum():.4g}; expected at most 1")
    return lower, upper


def project(log_weights: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The mixtures within the bounds that are nearest in KL(mixture || weights): clip(c * weights, lower, upper).

    log_weights: float64 [..., D], of weights that need not sum to one; -inf counts as vanishingly small.
    lower, upper: float64 [D] as from `bounds`. Returns float64 [..., D]; each row sums to 1 to rounding.
    """
    top = log_weights.max(axis=-1, keepdims=True)
    relative = np.maximum(log_weights - top, -_UNDERFLOW)
    # The sum of clip(c * weights) rises with c: bisect log c between all at the floor and all at the cap.
    low = np.full((*relative.shape[:-1], 1), -_UNDERFLOW - 50.0)
    high = np.full_like(low, _UNDERFLOW)
    for _ in range(70):
        middle = (low + high) / 2
        enough = _clipped(relative + middle, lower, upper).sum(axis=-1, keepdims=True) >= 1
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    weights = _clipped(relative + high, lower, upper)
    # What rounding left is shared by the weights between their bounds, so that those at a bound stay exactly there.
    free = (weights > lower) & (weights < upper)
    rest = np.where(free, weights, 0.0).sum(axis=-1, keepdims=True)
    wanted = 1 - np.where(free, 0.0, weights).sum(axis=-1, keepdims=True)
    scale = np.where((rest > 0) & (wanted > 0), wanted / np.where(rest > 0, rest, 1.0), 1.0)
    return np.where(free, np.clip(weights * scale, lower, upper), weights)


def _clipped(log_weights: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    return np.clip(np.exp(np.clip(log_weights, -_UNDERFLOW, 0.0)), lower, upper)


def _one_a_domain(what: str, values: npt.ArrayLike, names: Sequence[str]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim and array.shape != (len(names),):
        raise ConfigError(f"{what} has shape {list(array.shape)}; expected one number or [{len(names)}]")
    array = np.broadcast_to(array, (len(names),)).copy()
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        d = int(bad.argmax())
        raise ConfigError(f"{what} of {names[d]} is {array[d]}; expected a finite number >= 0")
    return array
