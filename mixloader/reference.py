"""The specification of the stream, in plain Python: which window stands in which row of each step.

The C++ core computes the same thing faster; tests compare the two token for token. Everything is
integer arithmetic on (seed, integer weights, cursors, residuals, step), so any machine, any number
of threads and any world size get the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import NamedTuple

from mixloader.mixture import WEIGHT_ONE

_32, _64 = (1 << 32) - 1, (1 << 64) - 1
_DITHER, _ORDER = 1, 2  # the last word of a Philox counter says what its numbers are for
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
    """Where `index` goes in the order of one epoch of n windows: a Feistel network on Z_a x Z_b."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    words = [
        word
        for block in range(4)
        for word in philox(seed ^ _ROUND_KEYS, [epoch & _32, ((epoch >> 32) << 8) | block, key & _32, key >> 32])
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


class Row(NamedTuple):
    """One row of a step: `window` counts through the shards of `domain`, stride seq_len."""

    domain: int
    window: int


class ReferenceStream:
    """The rows of each plan step, given the integer weights of each step.

    names: one a domain. windows: windows in one epoch of each. rows: the global batch.
    weights: {step: units}, units int [D] that sum to WEIGHT_ONE; each holds until the next.

    Quotas: each step adds rows * units to the residuals; then `rows` times the domain with the
    greatest residual + dither gives a row and pays WEIGHT_ONE. Domains of weight zero take no part.
    Let e be a residual in rows, that is quota minus count of a domain over all steps.

    Bound while no weight is zero: -2 < e <= 2 (H_D - 1), H_D = 1 + 1/2 + ... + 1/D.
    Below: residuals sum to a positive number until the last row is given, so the greatest is
    positive, and a dither below one row can promote only a residual above -1; it then pays 1.
    Above: let A_j be the mean of the j greatest residuals after a step; A_D = 0. If all rows of a
    step came from the top j, their sum did not grow. Else a row came from a domain c outside, whose
    residual plus dither was greatest, so all of the top j lie below c's value now + 2: thus
    A_j <= A_(j+1) + 2 / (j+1), and by induction A_1 <= 2 (H_D - 1).
    Bound with weights switched to and from zero at will: |e| <= D - 1. A domain switched off keeps its
    residual; with s of the top j switched on, the same argument asks of a bound g(j) on j A_j that
    (s+1) g(j) >= s g(j+1) + g(j-s) + 2s, which g(j) = j (D - j) meets. Below by symmetry.
    """

    def __init__(
        self,
        seed: int,
        names: Sequence[str],
        windows: Sequence[int],
        rows: int,
        weights: Mapping[int, Sequence[int]],
    ):
        self.seed, self.windows, self.rows, self.weights = seed, windows, rows, dict(weights)
        self.keys = [domain_key(name) for name in names]
        self.step = 0
        self.cursors = [0] * len(names)
        self.residuals = [0] * len(names)

    def units(self) -> Sequence[int]:
        """The integer weights of the next step."""
        return self.weights[max(step for step in self.weights if step <= self.step)]

    def next_step(self) -> list[Row]:
        """Plan one step and advance."""
        counts = self._counts(self.units())
        rows = [
            self._row(domain, self.cursors[domain] + i) for domain, count in enumerate(counts) for i in range(count)
        ]
        self._shuffle(rows)
        self.cursors = [cursor + count for cursor, count in zip(self.cursors, counts, strict=True)]
        self.step += 1
        return rows

    def _counts(self, units: Sequence[int]) -> list[int]:
        domains = range(len(units))
        self.residuals = [self.residuals[d] + self.rows * units[d] for d in domains]
        dither = [self._word(_DITHER, d) >> 2 for d in domains]
        counts = [0] * len(units)
        for _ in range(self.rows):
            drawn = max((d for d in domains if units[d]), key=lambda d: (self.residuals[d] + dither[d], -d))
            self.residuals[drawn] -= WEIGHT_ONE
            counts[drawn] += 1
        return counts

    def _row(self, domain: int, draw: int) -> Row:
        epoch, index = divmod(draw, self.windows[domain])
        return Row(domain, permute(self.seed, self.keys[domain], epoch, self.windows[domain], index))

    def _shuffle(self, rows: list[Row]) -> None:
        """Fisher-Yates from the last row down."""
        for i, last in enumerate(range(len(rows) - 1, 0, -1)):
            other = self._word(_ORDER, i) * (last + 1) >> 32
            rows[last], rows[other] = rows[other], rows[last]

    def _word(self, purpose: int, i: int) -> int:
        return philox(self.seed, [self.step & _32, self.step >> 32, i // 4, purpose])[i % 4]
