"""Conservative Q-learning (Kumar et al., arXiv 2006.04779) on a simplex, and an actor that follows it within bounds.

Critics learn the return of a decision (n-step targets, the lesser of two slow copies at what the actor asks for then),
and are pushed down where a softmax over other actions finds them higher than at the data's own (equation 4, with the
proposals of proposals.py). The actor climbs the critics, held near the one that it began as.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from mixloader.agent.offline.learner import Batch, Learner, Optimizer, Slow, act, moves, new_critic
from mixloader.agent.offline.proposals import move, propose
from mixloader.agent.offline.transitions import States, Transitions

ALPHA = 0.1
"""Weight of the conservative term beside the squared error, in units of the spread of returns. At 1 the critics say
where the data are rather than what they are worth: on the task of the tests the actor ended at 0.59 of 1, at 0.1 at
0.92, and at 0, which that task forgives, at 0.95."""

AHEAD = 8
"""Decisions whose rewards are summed before the slow critics take over: one of fifty changes little, eight do."""

HELD = 0.1
"""What it costs the actor to move otherwise than it first did: its mean squared difference, in the same units."""

FROZEN = 0.2
"""Part of the updates in which only the critics learn: an actor that climbs random critics forgets what it knew."""


class ConservativeQ(Learner):
    """data: as Learner. alpha, held: as the constants. The critics are there to be looked at."""

    def __init__(
        self, data: Transitions, actor: nn.Module, seed: int, updates: int, *, alpha: float = ALPHA, held: float = HELD
    ):
        super().__init__(data, actor, seed, updates)
        self.alpha, self.held = alpha, held
        self.critics = nn.ModuleList(new_critic(data, 2 * seed + k) for k in range(2))
        self._slow = Slow(self.critics)
        self._first = copy.deepcopy(actor).requires_grad_(False)
        self._by_critics = Optimizer(self.critics, updates)
        self._sums, self._then = data.ahead(AHEAD)
        returns = data.returns()
        # No return is outside what was seen: a bootstrapped target that is has run away.
        self._range = returns.min().item(), returns.max().item()

    def update(self, batch: Batch) -> dict[str, float]:
        states, action = self.states(batch), self.data.actions(batch.numbers)
        target = (self._sums[batch.numbers] + self._later(batch)).clamp(*self._range)
        others = torch.cat([propose(states, action, self.generator), self._asked(states)])
        losses, excesses = zip(*[self.losses(c, states, action, target, others) for c in self.critics], strict=True)
        loss, excess = torch.stack(losses).sum(), torch.stack(excesses).sum()
        self._by_critics.descend(loss + self.alpha * excess)
        self._slow.follow()
        measured = {"critic": loss.item(), "excess": excess.item()}
        return measured | (self._climb(states) if self.done >= FROZEN * self.updates else {})

    @staticmethod
    def losses(
        critic: nn.Module, states: States, action: Tensor, target: Tensor, others: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The error of the data's actions, and by how much a softmax over `others` [K, B, D] and them exceeds them."""
        every = torch.cat([action[None], others])
        values = critic(*(part.repeat(len(every), *[1] * (part.dim() - 1)) for part in states[:5]), every.flatten(0, 1))
        values = values.view(len(every), -1)
        own = values[0]
        excess = torch.logsumexp(values, dim=0) - math.log(len(values)) - own
        return 0.5 * (own - target).square().mean(), excess.mean()

    @torch.no_grad()
    def _asked(self, states: States) -> Tensor:
        """What the actor asks for, and neighbours of it, [2, B, D]: where critics that are too high would draw it."""
        part = moves(self.actor, states)
        noise = 0.2 * torch.randn(part.shape, generator=self.generator)
        return torch.stack([move(states, part), move(states, (part + noise).clamp(-1, 1))])

    @torch.no_grad()
    def _later(self, batch: Batch) -> Tensor:
        then = self._then[batch.numbers]
        states = self.states(batch._replace(numbers=torch.where(then >= 0, then, batch.numbers)))
        action = act(self.actor, states)
        value = torch.stack([critic(*states[:5], action) for critic in self._slow.networks]).amin(0)
        return torch.where(then >= 0, value, torch.zeros(()))

    def _climb(self, states: States) -> dict[str, float]:
        part = moves(self.actor, states)
        action = move(states, part)
        value = torch.stack([critic(*states[:5], action) for critic in self.critics]).amin(0).mean()
        with torch.no_grad():
            first = moves(self._first, states)
        away = ((part - first).square().sum(-1) / states.mask.sum(-1)).mean()
        self.by_actor.descend(-value + self.held * away)
        return {"value": value.item(), "away": away.item()}
