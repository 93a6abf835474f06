"""A mixture: one weight a domain, held as integers that sum to `WEIGHT_ONE`.

Weights are made integers once, where they enter; everything after that (quotas, residuals, the
record, a broadcast to other ranks) is integer arithmetic, so that rounding on one machine cannot
change a stream on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mixloader.errors import WeightsError

WEIGHT_ONE = 1 << 30
"""What the integer weights of a mixture sum to. A weight under about 5e-10 becomes zero."""


Weights = Mapping[str, float] | Sequence[float] | npt.ArrayLike
"""One number a domain, by name or in order: a mapping, a sequence, an array or a tensor."""


def as_weights(weights: Weights, names: Sequence[str]) -> np.ndarray:
    """Check `weights` and bring them into the order of `names`; not yet normalised.

    weights: one finite, non-negative number a domain, not all zero: a sequence, array or tensor of
        shape [D] in the order of `names`, or a mapping from name to weight (absent names get zero).
    Returns float64 [D]. Raises WeightsError and changes nothing otherwise.
    """
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise WeightsError(f"unknown domain {unknown[0]!r} in weights; the domains are {', '.join(names)}")
        weights = [weights.get(name, 0.0) for name in names]
    try:
        w = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"weights must be numbers, one a domain, but got {weights!r}") from error
    if w.shape != (len(names),):
        raise WeightsError(f"weights have shape {list(w.shape)}; expected [{len(names)}], one for each domain")
    unusable = ~(np.isfinite(w) & (w >= 0))
    if unusable.any():
        domain = int(unusable.argmax())
        raise WeightsError(f"the weight of domain {names[domain]!r} is {w[domain]}; expected a finite number >= 0")
    if not w.any():
        raise WeightsError("all weights are zero; at least one domain needs a weight above zero")
    return w


def quantize(weights: np.ndarray) -> np.ndarray:
    """Normalise float64 [D] to int64 [D] that sum to WEIGHT_ONE, by largest remainder.

    Equal remainders go to the lower index. A positive weight may round to zero, never the reverse.
    """
    # Integers from here on: with weights of at most 2^33 every product below fits 64 bits, the sum of
    # the parts cannot pass WEIGHT_ONE, and as_fractions(units) comes back as the same units.
    parts = np.rint(np.asarray(weights, dtype=np.float64) / np.max(weights) * 2.0**33).astype(np.uint64)
    scaled, total = parts * np.uint64(WEIGHT_ONE), parts.sum()
    units = (scaled // total).astype(np.int64)
    missing = WEIGHT_ONE - int(units.sum())
    by_remainder = np.argsort(total - scaled % total, kind="stable")
    units[by_remainder[:missing]] += 1
    return units


def as_fractions(units: Sequence[int] | np.ndarray) -> np.ndarray:
    """Integer weights [D] back as float64 [D] that sum to 1."""
    return np.asarray(units, dtype=np.int64) / WEIGHT_ONE
