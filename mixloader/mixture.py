"""A mixture: one weight a domain, held as integers that sum to `WEIGHT_ONE`.

Weights are made integers once, where they enter; everything after that (quotas, residuals, the
record, a broadcast to other ranks) is integer arithmetic, so that rounding on one machine cannot
change a stream on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mixloader._core import quantize as quantize  # reference.quantize, fast
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
        unknown = weights.keys() - set(names)
        if unknown:
            raise WeightsError(
                f"unknown domain {min(unknown, key=str)!r} in weights; the domains are {', '.join(names)}"
            )
        weights = [weights.get(name, 0.0) for name in names]
    try:
        if isinstance(weights, torch.Tensor):
            weights = weights.detach().to("cpu", torch.float64).numpy()
        w = np.asarray(weights)
        if w.dtype.kind not in "iufb":
            raise TypeError(f"they are {w.dtype}")
        w = w.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"weights must be numbers, one a domain, but got {weights!r}") from error
    if w.shape != (len(names),):
        raise WeightsError(f"weights have shape {list(w.shape)}; expected [{len(names)}], one for each domain")
    if not (w.size and w.min() >= 0 and 0 < w.max() < np.inf):  # NaN fails the first
        _refuse(w, names)
    return w


def _refuse(weights: np.ndarray, names: Sequence[str]) -> None:
    unusable = ~(np.isfinite(weights) & (weights >= 0))
    if unusable.any():
        domain = int(unusable.argmax())
        raise WeightsError(
            f"the weight of domain {names[domain]!r} is {weights[domain]}; expected a finite number >= 0"
        )
    raise WeightsError("all weights are zero; at least one domain needs a weight above zero")


def grouped(
    group_weights: Mapping[str, float],
    names: Sequence[str],
    groups: Sequence[str | None],
    within: Weights | None = None,
) -> np.ndarray:
    """Weights of domains from weights of groups: that of the group times the domain's share of its group.

    group_weights: by group; absent groups get zero. names, groups: one a domain, as in a DomainTable; a
        domain without a group (None) is one of its own, under its name.
    within: as for as_weights, in proportion to which the domains of a group share its weight, for
        example a DomainTable's prior; by default alike.
    Returns float64 [D] that sum to 1. Raises WeightsError for weights that are none, an unknown group,
    a group with a weight whose domains have none, and a group with the name of a domain that has none.
    """
    own = [name if group is None else group for name, group in zip(names, groups, strict=True)]
    clash = {name for name, group in zip(names, groups, strict=True) if group is None}.intersection(
        group for group in groups if group is not None
    )
    if clash:
        raise WeightsError(f"{min(clash)!r} is both a group and a domain without one; give that domain a group")
    members = list(dict.fromkeys(own))
    unknown = group_weights.keys() - set(members)
    if unknown:
        raise WeightsError(f"unknown group {min(unknown, key=str)!r} in weights; the groups are {', '.join(members)}")
    weights = as_weights(group_weights, members)
    group_of = np.array([members.index(group) for group in own])
    share = np.ones(len(names)) if within is None else as_weights(within, names)
    weights, share = weights / weights.max(), share / share.max()
    totals = np.bincount(group_of, weights=share, minlength=len(members))
    starved = (totals == 0) & (weights > 0)
    if starved.any():
        raise WeightsError(
            f"group {members[int(starved.argmax())]!r} has a weight, but none of its domains has one within it"
        )
    shared = share / np.where(totals > 0, totals, 1)[group_of]
    return weights[group_of] / weights.sum() * shared


def without(removed: Sequence[str], weights: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """float64 [D]: the weights with zero for the removed domains. Raises WeightsError if nothing is left."""
    if not removed:
        return weights
    kept = np.where([name in removed for name in names], 0.0, weights)
    if not kept.any():
        raise WeightsError(f"all the weight is on domains that were removed: {', '.join(removed)}")
    return kept


def as_fractions(units: Sequence[int] | np.ndarray) -> np.ndarray:
    """Integer weights [D] back as float64 [D] that sum to 1."""
    return np.asarray(units, dtype=np.int64) / WEIGHT_ONE
