"""Guards: what holds for the weights of any policy, whatever it asks for.

Bounds on each domain and field, a bound on how fast the mixture moves, and a deadline. They stand between the answer
of a policy and the loader; the record has both what was asked for and what was done. Limits of repetition are the
loader's (max_epochs): a domain past its limit counts as closed here, and its share goes to the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mixloader.errors import ConfigError
from mixloader.observation import DomainTable

_ROUNDING = 1e-9  # by which bounds that are sums of decimal fractions may miss 1
_NOTHING = 1e-30  # a weight that is less than this part of the greatest is taken for 0


@dataclass(frozen=True)
class Guards:
    """Bounds for a Mixer; each is a part of the mixture, which sums to 1.

    floor, cap: least and greatest weight of a domain: one number for all, or by name (absent names: 0 and 1).
    fields: (least, greatest) sum of the weights of a field's domains, by field: {"source": (0.3, 0.9)}.
    change: greatest total variation, half the sum of |new - old|, for each million tokens read since the last decision;
        so twice as many decisions of half the reach go as far. It comes last: weights that were set outside of the
        bounds are led back into them no faster.
    deadline_s: seconds after which a decision is made without the policy's answer. With it, and only with it, the
        weights depend on timing; the record tells what they were, and replays are as exact as ever.

    Within the bounds the weights are those that keep the ratios that the policy asked for (see `project`). Domains that
    were removed or have run out get nothing; if the others' bounds then leave no mixture, they are scaled.
    Raises ConfigError for values that are no bounds.
    """

    floor: float | Mapping[str, float] = 0.0
    cap: float | Mapping[str, float] = 1.0
    fields: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    change: float | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("floor", self.floor), ("cap", self.cap)):
            for of, bound in value.items() if isinstance(value, Mapping) else [("", value)]:
                _check_part(f"{name} of {of!r}" if of else name, bound)
        for of, bounds in self.fields.items():
            if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
                raise ConfigError(f"the bounds of field {of!r} are {bounds!r}; expected (least, greatest)")
            for bound in bounds:
                _check_part(f"a bound of field {of!r}", bound)
        for name, limit in (("change", self.change), ("deadline_s", self.deadline_s)):
            if limit is not None and not (_is_number(limit) and limit > 0):
                raise ConfigError(f"{name} is {limit!r}; expected a number above 0, or None for no bound")

    def bind(self, domains: DomainTable, *, check: bool = True) -> BoundGuards:
        """These guards for the domains of a run.

        Raises ConfigError for a name or field that no domain has, and for bounds that leave no mixture; the latter not
        without `check`, for a run that goes on with other domains.
        """
        low = _by_name("floor", self.floor, domains.names, 0.0)
        high = _by_name("cap", self.cap, domains.names, 1.0)
        unknown = self.fields.keys() - {name for name in domains.fields if name is not None}
        if unknown:
            raise ConfigError(f"guards bound the field {min(unknown)!r}, which no domain has")
        names = [name for name in dict.fromkeys(domains.fields) if name is not None and name in self.fields]
        group = np.array([names.index(of) if of in names else len(names) for of in domains.fields])
        sums = np.array([*(self.fields[name] for name in names), (0.0, 1.0)], dtype=np.float64)
        bound = BoundGuards(low, high, group, sums[:, 0], sums[:, 1], self.change)
        if check:
            _check_fit(low, high, domains.names)
            _check_fit(sums[:, 0], sums[:, 1], names)
            _check_groups(bound, names)
        return bound

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults; JSON-able. Guards(**guards.to_json()) are the same guards."""
        default = asdict(Guards())
        values = {key: value for key, value in asdict(self).items() if value != default[key]}
        if "fields" in values:
            values["fields"] = {name: list(bounds) for name, bounds in values["fields"].items()}
        return values


@dataclass(frozen=True, eq=False)
class BoundGuards:
    """Guards for D domains in G groups (the bounded fields, and all other domains as the last).

    low, high: float64 [D]. group: int64 [D]. group_low, group_high: float64 [G]. change: per million tokens.
    """

    low: np.ndarray
    high: np.ndarray
    group: np.ndarray
    group_low: np.ndarray
    group_high: np.ndarray
    change: float | None

    def bound(self, weights: np.ndarray, closed: np.ndarray | None = None) -> np.ndarray:
        """float64 [D], sums to 1: weights [D] >= 0, not all zero, brought between the bounds.

        First the groups' sums are projected between theirs, then the domains of each group onto the group's sum.
        closed: bool [D], not all: domains that get nothing.
        """
        low, high = self.low, self.high
        if closed is not None:
            low, high = np.where(closed, 0.0, low), np.where(closed, 0.0, high)
        groups = len(self.group_low)
        weights = weights / weights.sum()
        if groups == 1:
            return project(weights, low, high)
        inside_low, inside_high = _sums(low, self.group, groups), _sums(high, self.group, groups)
        wanted = project(
            _sums(weights, self.group, groups),
            np.clip(self.group_low, inside_low, inside_high),
            np.clip(self.group_high, inside_low, inside_high),
        )
        out = np.zeros(len(weights))
        for number, total in enumerate(wanted):
            inside = self.group == number
            out[inside] = project(weights[inside], low[inside], high[inside], total)
        return out

    def apply(
        self, weights: np.ndarray, before: np.ndarray, tokens_since: int, closed: np.ndarray | None = None
    ) -> np.ndarray:
        """float64 [D], sums to 1: what becomes of the weights [D] that a policy asks for.

        before: float64 [D], sums to 1, the weights they follow; tokens_since: read since the last decision.
        """
        bounded = self.bound(weights, closed)
        if self.change is None:
            return bounded
        moved = bounded - before
        most, distance = self.change * tokens_since / 1e6, 0.5 * np.abs(moved).sum()
        return bounded if distance <= most else before + moved * (most / distance)


def project(weights: np.ndarray, low: np.ndarray, high: np.ndarray, total: float = 1.0) -> np.ndarray:
    """float64 [D]: clip(s * weights, low, high) for the s with which they sum to `total`: exact, O(D log D).

    That is the point of {low <= x <= high, sum(x) = total} nearest to the weights in relative entropy, so that
    domains away from their bounds keep their ratios (the nearest in the Euclidean sense would take the same amount
    from each, and so all from the small ones). Weights of 0 are taken for equal and far below all others.
    weights, low, high: float64 [D] >= 0, low <= high. If no point is between the bounds, the nearer ones are scaled.
    """
    weights, low, high = (np.asarray(values, dtype=np.float64) for values in (weights, low, high))
    if (low <= weights).all() and (weights <= high).all() and abs(weights.sum() - total) <= 1e-12:
        return weights
    for bounds, beyond in ((low, low.sum() >= total), (high, high.sum() <= total)):
        if beyond:
            return bounds * (total / bounds.sum()) if bounds.any() else np.zeros_like(bounds)
    if not (weights > 0).any():
        weights = np.ones_like(weights)
    positive = weights > _NOTHING * weights.max()
    of_zero = low[~positive].sum()
    if high[positive].sum() + of_zero < total:
        # Even at their caps the others leave something over, which those with weight 0 share.
        out = high.copy()
        rest = total - high[positive].sum()
        out[~positive] = project(np.ones(int((~positive).sum())), low[~positive], high[~positive], rest)
        return out
    out = low.copy()
    w, lo, hi = weights[positive], low[positive], high[positive]
    out[positive] = np.clip(_scale(w, lo, hi, total - of_zero) * w, lo, hi)
    return out


def _scale(weights: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> float:
    """The s for which clip(s * weights, low, high) sums to `total`; all weights are above 0.

    The sum grows with s, and its slope changes only where a weight leaves its floor or reaches its cap.
    """
    leaves, reaches = low / weights, high / weights
    ends = np.unique(np.concatenate((leaves, reaches)))
    first, last = 0, len(ends) - 1
    while first < last:  # the first end at which the sum is enough
        middle = (first + last) // 2
        if np.clip(ends[middle] * weights, low, high).sum() < total:
            first = middle + 1
        else:
            last = middle
    # Just below that end these are on their way; the rest is at a bound.
    moving = (leaves < ends[first]) & (reaches >= ends[first])
    slope = weights[moving].sum()
    if slope == 0.0:
        return float(ends[first])
    fixed = np.where(reaches < ends[first], high, low)[~moving].sum()
    return float((total - fixed) / slope)


def _check_fit(low: np.ndarray, high: np.ndarray, labels: Sequence[str]) -> None:
    """Bounds of each, and of the last one without a label, between which a mixture fits."""
    for index, label in enumerate(labels):
        if low[index] > high[index]:
            raise ConfigError(f"the least weight of {label!r} is {low[index]:g}, above its greatest, {high[index]:g}")
    if low.sum() > 1 + _ROUNDING:
        raise ConfigError(f"the least weights of {', '.join(labels)} sum to {low.sum():g}, above 1; lower some")
    if high.sum() < 1 - _ROUNDING:
        raise ConfigError(f"the greatest weights of {', '.join(labels)} sum to {high.sum():g}, below 1; raise some")


def _check_groups(guards: BoundGuards, fields: Sequence[str]) -> None:
    """The bounds of fields and of domains together."""
    groups = len(guards.group_low)
    low, high = _sums(guards.low, guards.group, groups), _sums(guards.high, guards.group, groups)
    for index, name in enumerate(fields):
        least, greatest = guards.group_low[index], guards.group_high[index]
        if low[index] > greatest + _ROUNDING or high[index] < least - _ROUNDING:
            raise ConfigError(
                f"field {name!r} is to have from {least:g} to {greatest:g}, but its domains together from "
                f"{low[index]:g} to {high[index]:g}; change the bounds of the one or of the others"
            )
    low, high = np.maximum(low, guards.group_low), np.minimum(high, guards.group_high)
    if low.sum() > 1 + _ROUNDING or high.sum() < 1 - _ROUNDING:
        raise ConfigError(
            f"under the bounds of fields and domains together the weights sum to at least {low.sum():g} and at most "
            f"{high.sum():g}, which leaves no mixture; widen some"
        )


def _sums(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    return np.bincount(group, weights=values, minlength=groups)


def _by_name(what: str, value: float | Mapping[str, float], names: tuple[str, ...], default: float) -> np.ndarray:
    if not isinstance(value, Mapping):
        return np.full(len(names), float(value))
    unknown = value.keys() - set(names)
    if unknown:
        raise ConfigError(f"the guards' {what} names {min(unknown)!r}; the domains are {', '.join(names)}")
    return np.array([value.get(name, default) for name in names], dtype=np.float64)


def _check_part(what: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ConfigError(f"{what} is {value!r}; expected a number from 0 to 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
