"""Covering arrays: few combinations of options in which every pair of options occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
    """(factor, level, factor, level) of every two factors of a row of levels."""
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of {factor: level} that hold every pair of levels of any two factors at least once; the same every time.

    Greedy: of some random rows with a pair that is missing, the one with the most missing pairs.
    """
    sizes = [len(levels) for levels in factors.values()]
    missing = set().union(
        *(
            {(i, a, j, b) for a in range(sizes[i]) for b in range(sizes[j])}
            for i, j in itertools.combinations(range(len(sizes)), 2)
        )
    )
    generator = random.Random(seed)
    rows = []
    while missing:
        candidates = []
        for i, a, j, b in generator.sample(sorted(missing), min(40, len(missing))):
            row = [generator.randrange(size) for size in sizes]
            row[i], row[j] = a, b
            candidates.append(row)
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append({name: levels[k] for (name, levels), k in zip(factors.items(), best, strict=True)})
    return rows
