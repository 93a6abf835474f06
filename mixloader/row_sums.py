"""Sums of row sketches by group (domain or field), with a decay, and what they say of each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_COLUMNS = 4  # after the sketch: rows, units, squared norm, rows with products; then products and their squares


class RowSums:
    """Sums over the rows of each group.

    groups: how many. size: numbers of a sketch. others: groups of the other side, with whose means the sketches
    are multiplied row by row, for the standard error.

    What is added goes to `new`, float32 [groups + 1, size + columns], whose last row counts what was left out. `fold`
    moves it to `sums`, float32 [groups, ...], where what was there has halved `half_life` plan steps later; a group
    that has no new rows is left alone, which changes no mean and lets none fade to zero.
    """

    def __init__(self, groups: int, size: int, others: int, half_life: float, device: torch.device):
        self.groups, self.size, self.others, self.half_life = groups, size, others, half_life
        width = size + _COLUMNS + 2 * others
        self.new = torch.zeros(groups + 1, width, device=device)
        self.sums = torch.zeros(groups, width, device=device)
        self.weights = torch.zeros(groups, 2, device=device)  # sums of w² and of w² |sketch|², w the decayed weights
        self.steps = torch.full((groups,), -1.0, dtype=torch.float64, device=device)  # of the latest rows
        self.bad = torch.zeros(
            2, device=device
        )  # rows left out: not finite, ever; of an unknown group, at the last fold

    def add(self, sketches: Tensor, groups: Tensor, units: Tensor, means: Tensor | None) -> None:
        """Add rows. sketches: [n, size]; groups: int64 [n], -1 counts nowhere; units: [n], what `mean` divides by,
        0 leaves a row out. means: [others, size], of the other side, None if they are not known.

        Rows that are not finite are left out, as are those of a group that is not there.
        """
        squares = sketches.square().sum(1)
        known = (groups >= -1) & (groups < self.groups)
        finite = squares.isfinite()
        counted = known & finite & (units > 0)
        # The mean of a group without rows is NaN.
        products = (
            sketches @ means.nan_to_num().T if means is not None else squares.new_zeros(len(squares), self.others)
        )
        ones = torch.ones_like(squares)
        columns = torch.stack([ones, units, squares, ones * (means is not None)], 1)
        rows = torch.cat([sketches, columns, products, products.square()], 1)
        # A product with a one-hot matrix and not index_add_, which on a GPU adds in no fixed order.
        hot = groups == torch.arange(self.groups, device=groups.device)[:, None]
        self.new[:-1].addmm_(hot.to(rows.dtype), torch.where(counted[:, None], rows, 0.0))
        self.new[-1, :2] += torch.stack([(known & ~finite).sum(), (~known).sum()])

    def fold(self, step: int) -> None:
        """Move what is new, the rows of plan step `step`, to the sums."""
        new = self.new[:-1]
        count = new[:, self.size]
        factor = torch.where(count > 0, 0.5 ** ((step - self.steps) / self.half_life), 1.0).float()
        factor = torch.where(self.steps < 0, 1.0, factor)
        self.sums.mul_(factor[:, None]).add_(new)
        self.weights.mul_(factor[:, None].square()).add_(new[:, self.size : self.size + 3 : 2])
        self.steps = torch.where(count > 0, float(step), self.steps)
        self.bad[0] += self.new[-1, 0]
        self.bad[1] = self.new[-1, 1]
        self.new.zero_()

    def means(self) -> Tensor:
        """float32 [groups, size]: the sum of the sketches by the sum of the units; NaN where there are no rows."""
        return self.sums[:, : self.size] / self._column(1)[:, None]

    def count(self) -> Tensor:
        """[groups]: how many rows of equal weight tell as much, (sum of w)² / sum of w²; NaN where there are none."""
        return self._column(0).square() / self.weights[:, 0]

    def norm_sq(self) -> Tensor:
        """[groups]: mean squared norm of a row's sketch."""
        return self._column(2) / self._column(0)

    def gram(self, means: Tensor) -> Tensor:
        """[groups, groups]: inner products of the means, where a unit is a row.

        The diagonal is without the noise of the mean: ((sum w s)² - sum w² s²) / ((sum w)² - sum w²) is unbiased. It is
        NaN for a single row.
        """
        gram = means @ means.T
        rows, (weights, norms) = self._column(0).square(), self.weights.T
        unbiased = (gram.diagonal() * rows - norms) / (rows - weights)
        return gram.diagonal_scatter(torch.where(rows > 1.001 * weights, unbiased, math.nan))

    def variance(self) -> Tensor:
        """[groups, others]: variance of the mean of the products, from their spread over rows; NaN if not known."""
        known = self._column(3)[:, None]
        first, second = self.sums[:, self.size + _COLUMNS :].split(self.others, 1)
        spread = second / known - (first / known).square()
        rows = self._column(0)
        by_rows = spread.clamp(min=0.0) * (self.weights[:, :1] / rows.square()[:, None])
        return by_rows * (rows / self._column(1)).square()[:, None]

    def grow(self, groups: int, others: int) -> RowSums:
        """The same with more groups, or more on the other side, of which nothing is known."""
        grown = RowSums(groups, self.size, others, self.half_life, self.sums.device)
        fixed = self.size + _COLUMNS
        grown.sums[: self.groups, :fixed] = self.sums[:, :fixed]
        for part, products in enumerate(self.sums[:, fixed:].split(self.others, 1)):
            begin = fixed + part * others
            grown.sums[: self.groups, begin : begin + self.others] = products
        grown.weights[: self.groups], grown.steps[: self.groups] = self.weights, self.steps
        grown.bad += self.bad
        return grown

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "weights": self.weights, "steps": self.steps, "bad": self.bad}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.new.zero_()

    def _column(self, number: int) -> Tensor:
        return self.sums[:, self.size + number]
