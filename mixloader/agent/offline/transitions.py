"""Decisions of finished runs as padded tensors: what was seen, what was done, what came of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from mixloader.agent.transformer import Seen


class Runs(NamedTuple):
    """R runs from their begins, and which of their moments are the decisions that are asked for, int64 [R, K]."""

    seen: Seen
    at: Tensor


class States(NamedTuple):
    """What a network is shown of B decisions, float32: domain [B, D, P], run [B, G], weights and prior [B, D] (zero
    where padded), mask bool [B, D], limit [B]: how far a log weight may move. runs: makes the runs they are of, for
    networks that read what was before."""

    domain: Tensor
    run: Tensor
    weights: Tensor
    prior: Tensor
    mask: Tensor
    limit: Tensor
    runs: Callable[[], Runs]


@dataclass(frozen=True)
class Transitions:
    """N decisions of one or many runs, those of a run one after the other. float32 unless said otherwise.

    domain [N, D, P], run [N, G], weights, prior [N, D], mask bool [N, D], limit [N]: the state (`States`).
    action [N, D]: the weights that were in force after the decision; zero where padded.
    reward [N]: the change of the score until the next decision. left int64 [N]: decisions that follow in the run.
    tokens, budget [N]: read so far and of the run as far as was known, in any unit.
    """

    domain: Tensor
    run: Tensor
    weights: Tensor
    prior: Tensor
    mask: Tensor
    limit: Tensor
    action: Tensor
    reward: Tensor
    left: Tensor
    tokens: Tensor
    budget: Tensor

    def __len__(self) -> int:
        return len(self.reward)

    def states(self, index: Tensor, together: int = 1) -> States:
        """Those of some decisions, cut to the domains that any of them has.

        together: so many, one after the other in `index`, are of one run.
        """
        mask = self.mask[index]
        size = int(mask.sum(1).max())
        return States(
            self.domain[index, :size], self.run[index], self.weights[index, :size], self.prior[index, :size],
            mask[:, :size], self.limit[index], functools.partial(self._runs_of, index, together, size),
        )  # fmt: skip

    def _runs_of(self, index: Tensor, together: int, size: int) -> Runs:
        begin = self.begin[index[::together]]
        at = index.view(-1, together) - begin[:, None]
        last = begin + at.amax(1)
        # Moments that pad a shorter run are its last one: no earlier one sees them.
        whole = torch.minimum(begin[:, None] + torch.arange(int(at.max()) + 1), last[:, None])
        wide = (self.domain, self.weights, self.prior, self.mask)
        domain, weights, prior, mask = (values[:, :size][whole] for values in wide)
        run, tokens, budget = (values[whole] for values in (self.run, self.tokens, self.budget))
        return Runs(Seen(domain, run, weights, prior, mask, tokens, budget), at)

    @functools.cached_property
    def begin(self) -> Tensor:
        """The first decision of the run of each, int64 [N]."""
        return torch.tensor([run.start for run in self.runs() for _ in run], dtype=torch.int64)

    def beside(self, index: Tensor, count: int, generator: Generator) -> Tensor:
        """`count` decisions of the run of each of some, drawn with replacement, int64 [B * count]."""
        begin = self.begin[index]
        length = index + self.left[index] + 1 - begin
        place = torch.rand(len(index), count, generator=generator, dtype=torch.float64) * length[:, None]
        return (begin[:, None] + place.long()).flatten()

    def actions(self, index: Tensor) -> Tensor:
        """[B, D] as many domains as `states(index)` has."""
        return self.action[index, : int(self.mask[index].sum(1).max())]

    def returns(self) -> Tensor:
        """The sum of the rewards from each decision to the end of its run, [N]."""
        return self.ahead(len(self))[0]

    def ahead(self, steps: int) -> tuple[Tensor, Tensor]:
        """The sum of up to `steps` rewards from each decision, [N], and the decision that comes then, int64 [N]; -1
        where the run is over before."""
        total = np.concatenate([[0.0], np.cumsum(self.reward.double().numpy())])
        here = np.arange(len(self))
        left = self.left.numpy()
        then = here + np.minimum(steps, left + 1)
        sums = torch.from_numpy(total[then] - total[here]).float()
        return sums, torch.from_numpy(np.where(steps <= left, then, -1))

    def scaled(self, factor: float) -> Transitions:
        """With all rewards times `factor`."""
        return replace(self, reward=self.reward * factor)

    def runs(self) -> Iterator[range]:
        """The decisions of each run."""
        start = 0
        for end in (torch.nonzero(self.left == 0).flatten() + 1).tolist():
            yield range(start, end)
            start = end

    def where(self, runs: Sequence[int]) -> Transitions:
        """Only the runs of these numbers, in this order."""
        every = list(self.runs())
        index = torch.tensor([i for number in runs for i in every[number]], dtype=torch.int64)
        return Transitions(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Transitions]) -> Transitions:
        """Those of all parts, padded to the largest number of domains."""
        size = max(part.mask.shape[1] for part in parts)
        columns = {
            f.name: torch.cat([_pad(f.name, getattr(part, f.name), size) for part in parts]) for f in fields(cls)
        }
        return cls(**columns)


def _pad(name: str, values: Tensor, size: int) -> Tensor:
    if name not in ("domain", "weights", "prior", "mask", "action"):
        return values
    padded = values.new_zeros(len(values), size, *values.shape[2:])
    padded[:, : values.shape[1]] = values
    return padded
