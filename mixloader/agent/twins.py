"""Twins: the episodes of the simulator that real runs are identified with.

The agent is warmed up on them beside episodes whose numbers are drawn one by one: in twins, the numbers go together as
they do in real runs.
"""

from __future__ import annotations

import numpy as np

from mixloader.agent.episodes import Episodes, Ranges, asked_anew, cut, take
from mixloader.agent.identify import identify
from mixloader.agent.measured import Runs

COPIES = 4
"""Twins of each episode that was run: draws from what its measurements leave possible."""


def twins_of(runs: Runs, ranges: Ranges, rng: np.random.Generator, copies: int = COPIES) -> Episodes:
    """`copies` twins of each episode of the runs, float64 as Episodes are. Deterministic given `rng`.

    Now and then the search for a twin runs away to what is no number (1 of 128 when it was measured): it is left out.
    """
    found = [take(identify(runs, ranges, sample=rng).episodes, runs.first) for _ in range(copies)]
    every = Episodes(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))
    sound = [np.isfinite(array).reshape(len(array), -1).all(1) for array in every]
    return take(every, np.flatnonzero(np.all(sound, axis=0)))


def draw_twins(twins: Episodes, count: int, rng: np.random.Generator, ranges: Ranges) -> Episodes:
    """`count` of them, drawn with replacement, of which something else is asked than of the real runs."""
    return cut(asked_anew(take(twins, rng.integers(len(twins.size), size=count)), rng, ranges))
