"""From exact sums and cursors to the Observation that a policy sees.

An ObservationBuilder remembers what outlives one decision: where each domain stood at the last
observation, and the latest loss measured of each domain. All of it is in its state, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixloader.influence_table import InfluenceTable
from mixloader.mixture import as_fractions
from mixloader.observation import Observation, Signal
from mixloader.stats import StatsTable


class ObservationBuilder:
    """Builds the observations of one run, in order.

    windows: int64 [D], windows in one epoch of each domain. seq_len: tokens of a window.
    token_budget: tokens of the whole run, None where that is open.
    step, cursors: the last plan step that is over and int64 [D], windows drawn of each domain in it
        and before; the first observation counts from there.
    """

    def __init__(self, windows: np.ndarray, seq_len: int, token_budget: int | None, step: int, cursors: np.ndarray):
        self.windows, self.seq_len, self.token_budget = windows, seq_len, token_budget
        self.step = step
        self.cursors = cursors
        self.loss = np.full(len(windows), math.nan)
        self.loss_std = np.full(len(windows), math.nan)
        self.loss_count = np.zeros(len(windows), dtype=np.int64)
        self.loss_step = np.full(len(windows), -1, dtype=np.int64)
        self.excess = np.full(len(windows), math.nan)
        self.excess_count = np.zeros(len(windows), dtype=np.int64)
        self.excess_step = np.full(len(windows), -1, dtype=np.int64)

    def build(
        self,
        step: int,
        effect_step: int,
        cursors: np.ndarray,
        units: np.ndarray,
        stats: StatsTable,
        feedback: Mapping[str, tuple[float, int]],
        influence: InfluenceTable | None = None,
    ) -> Observation:
        """The observation after plan step `step`; later ones count from it.

        cursors: int64 [D], windows drawn up to the end of `step`. units: int64 [D], integer weights of
        effect_step as things stand. stats: sums since the last observation. feedback: by name, the
        latest value and the step after which it was reported. influence: as it stands after `step`.
        """
        self._measure(step, stats)
        seen = cursors * self.seq_len
        tokens = int(seen.sum())
        tokens_since = tokens - int(self.cursors.sum()) * self.seq_len
        self.step, self.cursors = step, cursors
        return Observation(
            step=step,
            effect_step=effect_step,
            tokens=tokens,
            tokens_since=tokens_since,
            progress=min(1.0, tokens / self.token_budget) if self.token_budget else math.nan,
            weights=as_fractions(units),
            seen=seen,
            epochs=cursors / self.windows,
            # Copies: what a policy does to its observation must not reach the next one.
            loss=Signal(
                value=self.loss.copy(),
                count=self.loss_count.copy(),
                age=np.where(self.loss_step < 0, -1, step - self.loss_step),
            ),
            loss_std=self.loss_std.copy(),
            excess=None if (self.excess_step < 0).all() else self._excess(step),
            feedback={
                name: Signal(np.array(value), np.array(1), np.array(step - reported))
                for name, (value, reported) in feedback.items()
            },
            **({} if influence is None else _influence(influence, step)),
        )

    def grow(self, windows: np.ndarray) -> None:
        """Go on with more domains at the end, of which nothing was read. windows: int64 [D], of all."""
        more = len(windows) - len(self.windows)
        self.windows = windows
        self.cursors = np.append(self.cursors, np.zeros(more, dtype=np.int64))
        self.loss = np.append(self.loss, np.full(more, math.nan))
        self.loss_std = np.append(self.loss_std, np.full(more, math.nan))
        self.loss_count = np.append(self.loss_count, np.zeros(more, dtype=np.int64))
        self.loss_step = np.append(self.loss_step, np.full(more, -1, dtype=np.int64))
        self.excess = np.append(self.excess, np.full(more, math.nan))
        self.excess_count = np.append(self.excess_count, np.zeros(more, dtype=np.int64))
        self.excess_step = np.append(self.excess_step, np.full(more, -1, dtype=np.int64))

    def _measure(self, step: int, stats: StatsTable) -> None:
        read = stats.tokens > 0
        count = stats.tokens[read]
        mean = stats.loss_sum[read] / count
        self.loss[read] = mean
        # The sums are rounded to fixed point, so a variance near zero may come out below it.
        self.loss_std[read] = np.sqrt(np.maximum(stats.loss_sq_sum[read] / count - mean * mean, 0.0))
        self.loss_count[read] = count
        self.loss_step[read] = step
        excess = stats.column("excess")
        # Without reference losses, and only then, not one token of any domain exceeds its own.
        if excess.any():
            self.excess[read] = excess[read] / count
            self.excess_count[read] = count
            self.excess_step[read] = step

    def _excess(self, step: int) -> Signal:
        return Signal(
            value=self.excess.copy(),
            count=self.excess_count.copy(),
            age=np.where(self.excess_step < 0, -1, step - self.excess_step),
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact."""
        return {
            "step": self.step,
            "cursors": self.cursors.tolist(),
            "loss": numbers_to_json(self.loss),
            "loss_std": numbers_to_json(self.loss_std),
            "loss_count": self.loss_count.tolist(),
            "loss_step": self.loss_step.tolist(),
            **({} if (self.excess_step < 0).all() else self._excess_to_json()),
        }

    def _excess_to_json(self) -> dict[str, Any]:
        return {
            "excess": numbers_to_json(self.excess),
            "excess_count": self.excess_count.tolist(),
            "excess_step": self.excess_step.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.cursors = np.array(state["cursors"], dtype=np.int64)
        self.loss = numbers_from_json(state["loss"])
        self.loss_std = numbers_from_json(state["loss_std"])
        self.loss_count = np.array(state["loss_count"], dtype=np.int64)
        self.loss_step = np.array(state["loss_step"], dtype=np.int64)
        never = len(self.loss_step)
        self.excess = numbers_from_json(state.get("excess", [None] * never))
        self.excess_count = np.array(state.get("excess_count", [0] * never), dtype=np.int64)
        self.excess_step = np.array(state.get("excess_step", [-1] * never), dtype=np.int64)


def _influence(table: InfluenceTable, step: int) -> dict[str, Any]:
    """What an Observation says of influence. Something measured from two sides is as old as the older one."""

    def signal(value: np.ndarray, count: np.ndarray, since: np.ndarray) -> Signal:
        return Signal(
            value=value.copy(),
            count=np.broadcast_to(np.nan_to_num(np.round(count)).astype(np.int64), value.shape).copy(),
            age=np.where(since < 0, -1, step - since),
        )

    each, other = table.rows[:, None], table.step[:, None]
    return {
        "influence": signal(table.value, each, np.minimum(other, table.probe_step)),
        "influence_std": table.std.copy(),
        "influence_fields": table.fields,
        "gram": signal(table.gram, np.minimum(each, table.rows), np.minimum(other, table.step)),
        "row_norm_sq": table.row_norm_sq.copy(),
    }


def rows_to_json(values: np.ndarray) -> list[list[float | None]]:
    """float64 [D, F] as lists; NaN as None."""
    return [numbers_to_json(row) for row in values]


def numbers_to_json(values: np.ndarray) -> list[float | None]:
    """float64 [D] as a list; NaN, which JSON does not have, as None."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def numbers_from_json(values: list[float | None]) -> np.ndarray:
    """What numbers_to_json gave, back as float64 [D]."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)
