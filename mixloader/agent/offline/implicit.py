"""Implicit Q-learning (Kostrikov et al., arXiv 2110.06169): never values an action that is not in the data.

A value network learns an upper expectile of Q over the data's actions (equation 5), Q learns from that value (equation
6), and the actor clones actions by their advantage (equation 7).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixloader.agent.offline.cloning import MOST, TEMPERATURE
from mixloader.agent.offline.learner import Batch, Learner, Optimizer, Slow, act, cross_entropy, new_critic
from mixloader.agent.offline.transitions import States, Transitions

EXPECTILE = 0.7
AHEAD = 8
"""Decisions whose rewards are summed before a value takes over: one decision of fifty changes little, eight do."""


class ImplicitQ(Learner):
    """Two critics, of which the lesser counts, and a value."""

    def __init__(self, data: Transitions, actor: nn.Module, seed: int, updates: int):
        super().__init__(data, actor, seed, updates)
        self.value, *critics = (new_critic(data, 3 * seed + k) for k in range(3))
        self.critics = nn.ModuleList(critics)
        self._slow = Slow(self.critics)
        self._by_value = Optimizer(self.value, updates)
        self._by_critics = Optimizer(self.critics, updates)
        self._sums, self._then = data.ahead(AHEAD)

    def update(self, batch: Batch) -> dict[str, float]:
        states, action = self.states(batch), self.data.actions(batch.numbers)
        with torch.no_grad():
            q = torch.stack([critic(*states[:5], action) for critic in self._slow.networks]).amin(0)
        advantage = q - self.value_of(states)
        expectile = torch.where(advantage > 0, EXPECTILE, 1 - EXPECTILE)
        self._by_value.descend((expectile * advantage.square()).mean())

        target = self._sums[batch.numbers] + self._later(batch)
        found = [critic(*states[:5], action) for critic in self.critics]
        loss = torch.stack([(q - target).square().mean() for q in found]).sum()
        self._by_critics.descend(loss)
        self._slow.follow()

        weight = torch.exp(advantage.detach() / TEMPERATURE).clamp_max(MOST)
        cloning = (weight * cross_entropy(states, act(self.actor, states), action)).mean()
        self.by_actor.descend(cloning)
        return {"critic": loss.item(), "value": advantage.square().mean().item(), "cloning": cloning.item()}

    def value_of(self, states: States) -> Tensor:
        """That of an action that changes nothing, as in cloning.py: [B]."""
        out: Tensor = self.value(*states[:5], states.weights)
        return out

    @torch.no_grad()
    def _later(self, batch: Batch) -> Tensor:
        then = self._then[batch.numbers]
        value = self.value_of(self.states(batch._replace(numbers=then.clamp_min(0))))
        return torch.where(then >= 0, value, torch.zeros(()))
