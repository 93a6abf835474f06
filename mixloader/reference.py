"""The specification of the stream, in plain Python: which window stands in which row of each step.

The C++ core computes the same thing faster; tests compare the two token for token. Everything is
integer arithmetic on (seed, integer weights, cursors, residuals, step), so any machine, any number
of threads and any world size get the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Literal, NamedTuple

from mixloader.mixture import WEIGHT_ONE

_32, _64 = (1 << 32) - 1, (1 << 64) - 1
_DITHER, _ORDER, _CHANCE = 1, 2, 3  # the last word of a Philox counter says what its numbers are for
_ROUND_KEYS = 0x9E3779B97F4A7C15  # sets the keys of permutations apart from the plan's numbers


def philox(key: int, counter: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011): a 64-bit key and four 32-bit words to four words."""
    k0, k1 = key & _32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _32, (p0 >> 32) ^ c3 ^ k1, p0 & _32
        k0, k1 = (k0 + 0x9E3779B9) & _32, (k1 + 0xBB67AE85) & _32
    return [c0, c1, c2, c3]


def domain_key(name: str) -> int:
    """What a domain's permutations are keyed by: its name, so that its neighbours do not matter."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def permute(seed: int, key: int, epoch: int, n: int, index: int) -> int:
    """Where `index` goes in the order of one epoch of n windows: a Feistel network on Z_a x Z_b.

    Orders come again after 2^56 epochs.
    """
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    words = [
        word
        for block in range(4)
        for word in philox(seed ^ _ROUND_KEYS, [epoch & _32, (epoch >> 32 << 8 | block) & _32, key & _32, key >> 32])
    ]
    while True:
        left, right = divmod(index, b)
        for i in range(0, 16, 2):
            left = (left + (_mix(words[i], right) * a >> 32)) % a
            right = (right + (_mix(words[i + 1], left) * b >> 32)) % b
        index = left * b + right
        if index < n:
            return index


def _mix(key: int, value: int) -> int:
    """The finalizer of splitmix64 over (key, value), of which 32 bits are kept."""
    z = (key << 32) ^ value
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    return (z ^ (z >> 31)) >> 32


def apportion(total: int, parts: Sequence[int]) -> list[int]:
    """`total` in proportion to `parts`, by largest remainder; equal remainders go to the lower index."""
    whole = sum(parts)
    shares = [part * total // whole for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: -(parts[i] * total % whole))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def quantize(weights: Sequence[float]) -> list[int]:
    """Weights >= 0, not all zero, as integers that sum to WEIGHT_ONE: those of `mixture.quantize`.

    With parts of at most 2^33, integer weights made into fractions come back as the same integers.
    """
    return apportion(WEIGHT_ONE, [round(w / max(weights) * 2**33) for w in weights])


class WindowOrder:
    """Which window of a domain each of its draws is.

    windows: windows in one epoch, of each shard. shuffle=False: as on disk. shuffle_shards=0: all
    windows are permuted, anew in each epoch. shuffle_shards=n: the shards that give windows are
    permuted with the domain's key and cut into blocks of n; the windows of block b, in that order,
    are permuted with the key + 1 + b.
    """

    def __init__(self, seed: int, key: int, windows: Sequence[int], *, shuffle: bool = True, shuffle_shards: int = 0):
        self.seed, self.key, self.shuffle, self.shuffle_shards = seed, key, shuffle, shuffle_shards
        starts = [sum(windows[:shard]) for shard in range(len(windows))]
        self.shards = [range(start, start + n) for start, n in zip(starts, windows, strict=True) if n]
        self.windows = sum(windows)

    def __call__(self, draw: int) -> int:
        """The window, counted through the shards, of a draw, counted through the epochs."""
        epoch, index = divmod(draw, self.windows)
        if not self.shuffle:
            return index
        if not self.shuffle_shards:
            return permute(self.seed, self.key, epoch, self.windows, index)
        n = len(self.shards)
        order = [self.shards[permute(self.seed, self.key, epoch, n, i)] for i in range(n)]
        for block, first in enumerate(range(0, n, self.shuffle_shards)):
            windows = [window for shard in order[first : first + self.shuffle_shards] for window in shard]
            if index < len(windows):
                return windows[permute(self.seed, self.key + 1 + block & _64, epoch, len(windows), index)]
            index -= len(windows)
        raise AssertionError("the blocks hold every window")


class Row(NamedTuple):
    """One row of a step: `window` counts through the shards of `domain`, stride seq_len."""

    domain: int
    window: int


class StreamEnd(Exception):
    """A limit was reached; the stream is where it was before the step."""


class ReferenceStream:
    """The rows of each plan step, given the integer weights of each step.

    names: one a domain. windows: windows in one epoch of each, or a list of those of each shard.
    rows: the global batch. weights: {step: units}, units int [D] that sum to WEIGHT_ONE; each holds
    until the next. limits: draws that each domain may give in all, None for any number.
    stop_at_limit: the step that would need a draw beyond a limit raises StreamEnd.

    Effective weights are those of the domains that take part, those with a weight and with draws
    left, scaled up to WEIGHT_ONE. Each step adds rows * effective weight to the residuals, and each
    row takes WEIGHT_ONE from that of its domain: a residual is what a domain is owed, quota minus count
    over all steps, and they sum to zero. A domain found at its limit hands what it is owed, if that is
    above zero, to those that take part, in proportion to their weights.
    "quota": `rows` times the domain with the greatest residual + dither gives a row; then the rows are
    shuffled. "multinomial": each row goes by chance. "exact": Megatron's greedy blend: row after row
    the greatest residual, where the quota of a row is added after it (but for the first of all).

    Let e be a residual in rows, under "quota", after a step.
    Bound while no weight is zero: -2 < e <= 2 (H_D - 1), H_D = 1 + 1/2 + ... + 1/D.
    Below: residuals sum to a positive number until the last row is given, so the greatest is
    positive, and a dither below one row can promote only a residual above -1; it then pays 1.
    Above: let A_j be the mean of the j greatest residuals after a step; A_D = 0. If all rows of a
    step came from the top j, their sum did not grow. Else a row came from a domain c outside, whose
    residual plus dither was greatest, so all of the top j lie below c's value now + 2: thus
    A_j <= A_(j+1) + 2 / (j+1), and by induction A_1 <= 2 (H_D - 1).
    Bound when limits are reached: -2 < e < 2 (D - 1). Below: a closed domain handed over all above
    zero, so the others' residuals sum to a positive number still, and what is handed over only adds to
    one. Above: they sum to zero, and none of the other D - 1 is at -2 or below.
    Bound with weights switched to and from zero at will, no limit reached: |e| <= D - 1. A domain
    switched off keeps its residual; with s of the top j switched on, the argument above asks of a
    bound g(j) on j A_j that (s+1) g(j) >= s g(j+1) + g(j-s) + 2s, which g(j) = j (D - j) meets. Below
    by symmetry.
    """

    def __init__(
        self,
        seed: int,
        names: Sequence[str],
        windows: Sequence[int | Sequence[int]],
        rows: int,
        weights: Mapping[int, Sequence[int]],
        *,
        shuffle: bool = True,
        shuffle_shards: int = 0,
        sampling: Literal["quota", "multinomial", "exact"] = "quota",
        limits: Sequence[int | None] | None = None,
        stop_at_limit: bool = False,
    ):
        self.seed, self.rows, self.weights, self.sampling = seed, rows, dict(weights), sampling
        self.orders = [
            WindowOrder(
                seed,
                domain_key(name),
                [shards] if isinstance(shards, int) else shards,
                shuffle=shuffle,
                shuffle_shards=shuffle_shards,
            )
            for name, shards in zip(names, windows, strict=True)
        ]
        self.limits = [_64 if limit is None else limit for limit in limits or [None] * len(names)]
        self.stop_at_limit = stop_at_limit
        self.step = 0
        self.cursors = [0] * len(names)
        self.residuals = [0] * len(names)

    def units(self) -> Sequence[int]:
        """The integer weights of the next step."""
        return self.weights[max(step for step in self.weights if step <= self.step)]

    def effective_units(self) -> list[int]:
        """The weights that the next step begins with; all zero if no domain can be drawn."""
        part = [u if u and self._left(d) else 0 for d, u in enumerate(self.units())]
        return apportion(WEIGHT_ONE, part) if any(part) else part

    def next_step(self) -> list[Row]:
        """Plan one step and advance."""
        before = list(self.cursors), list(self.residuals)
        try:
            rows = [self._take(domain) for domain in getattr(self, f"_by_{self.sampling}")()]
        except StreamEnd:
            self.cursors, self.residuals = before
            raise
        if self.sampling == "quota":
            self._shuffle(rows)
        self.step += 1
        return rows

    def _by_quota(self) -> list[int]:
        part = self._begin()
        self._add_quotas(self.rows, part)
        counts = [0] * len(part)
        while sum(counts) < self.rows:
            drawn = max(
                (d for d in range(len(part)) if part[d]),
                key=lambda d: (self.residuals[d] + (self._word(_DITHER, d) >> 2), -d),
            )
            if self._left(drawn) == counts[drawn]:
                self._close([drawn], part)
            else:
                self.residuals[drawn] -= WEIGHT_ONE
                counts[drawn] += 1
        return [domain for domain, count in enumerate(counts) for _ in range(count)]

    def _by_multinomial(self) -> list[int]:
        part = self._begin()
        self._add_quotas(self.rows, part)
        drawn: list[int] = []
        for row in range(self.rows):
            part = [u if self._left(d) > drawn.count(d) else 0 for d, u in enumerate(part)]
            if not any(part):
                raise StreamEnd
            point = self._word(_CHANCE, row) * sum(part) >> 32
            drawn.append(next(d for d in range(len(part)) if point < sum(part[: d + 1])))
            self.residuals[drawn[-1]] -= WEIGHT_ONE
        return drawn

    def _by_exact(self) -> list[int]:
        part = self._begin()
        drawn: list[int] = []
        while len(drawn) < self.rows:
            quotas = apportion(WEIGHT_ONE, part)
            ahead = quotas if self.step == 0 and not drawn else [0] * len(part)
            best = max((d for d in range(len(part)) if part[d]), key=lambda d: (self.residuals[d] + ahead[d], -d))
            if self._left(best) == drawn.count(best):
                self._close([best], part)
            else:
                self._add_quotas(1, part)
                self.residuals[best] -= WEIGHT_ONE
                drawn.append(best)
        return drawn

    def _begin(self) -> list[int]:
        """The weights of the domains that take part in a step; of the others zero."""
        part = list(self.units())
        self._close([d for d, u in enumerate(part) if u and not self._left(d)], part)
        return part

    def _close(self, domains: Sequence[int], part: list[int]) -> None:
        """Domains at their limit take no part from here on, and hand over what they are owed."""
        owed = [max(0, self.residuals[d]) for d in domains]
        for domain, rest in zip(domains, owed, strict=True):
            part[domain] = 0
            self.residuals[domain] -= rest
        if not any(part):
            raise StreamEnd
        self.residuals = [r + share for r, share in zip(self.residuals, apportion(sum(owed), part), strict=True)]

    def _add_quotas(self, rows: int, part: Sequence[int]) -> None:
        quotas = apportion(WEIGHT_ONE, part)
        self.residuals = [r + rows * quota for r, quota in zip(self.residuals, quotas, strict=True)]

    def _left(self, domain: int) -> int:
        """Draws that a domain may give from this step on, as far as it plans by them."""
        return _64 if self.stop_at_limit else max(0, self.limits[domain] - self.cursors[domain])

    def _take(self, domain: int) -> Row:
        draw = self.cursors[domain]
        if draw >= self.limits[domain]:
            raise StreamEnd
        self.cursors[domain] += 1
        return Row(domain, self.orders[domain](draw))

    def _shuffle(self, rows: list[Row]) -> None:
        """Fisher-Yates from the last row down."""
        for i, last in enumerate(range(len(rows) - 1, 0, -1)):
            other = self._word(_ORDER, i) * (last + 1) >> 32
            rows[last], rows[other] = rows[other], rows[last]

    def _word(self, purpose: int, i: int) -> int:
        return philox(self.seed, [self.step & _32, self.step >> 32, i // 4, purpose])[i % 4]
