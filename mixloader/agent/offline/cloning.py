"""Imitation of what the data did, all of it or the better part.

Behaviour cloning; and advantage-weighted regression (Peng et al., arXiv 1910.00177): cloning in which a decision
counts by exp(advantage / temperature), the advantage that of the return to the end of the run over a learnt value.
"""

from __future__ import annotations

import torch
from torch import nn

from mixloader.agent.offline.learner import Batch, Learner, Optimizer, act, cross_entropy, new_critic
from mixloader.agent.offline.transitions import Transitions

TEMPERATURE = 0.3
MOST = 20.0  # of a weight


class BehaviourCloning(Learner):
    """Asks for what the data did in such a state, on average."""

    def update(self, batch: Batch) -> dict[str, float]:
        states, action = self.states(batch), self.data.actions(batch.numbers)
        loss = cross_entropy(states, act(self.actor, states), action).mean()
        self.by_actor.descend(loss)
        return {"cloning": loss.item()}


class AdvantageWeighted(Learner):
    """Asks for what the data did where more came of it than is usual from such a state."""

    def __init__(self, data: Transitions, actor: nn.Module, seed: int, updates: int):
        super().__init__(data, actor, seed, updates)
        self.value = new_critic(data, seed)
        self._by_value = Optimizer(self.value, updates)
        self._returns = data.returns()

    def update(self, batch: Batch) -> dict[str, float]:
        states, action = self.states(batch), self.data.actions(batch.numbers)
        # The value of a state is that of an action that changes nothing: one network, no second kind of it.
        value = self.value(*states[:5], states.weights)
        advantage = self._returns[batch.numbers] - value
        self._by_value.descend(advantage.square().mean())
        weight = torch.exp(advantage.detach() / TEMPERATURE).clamp_max(MOST)
        loss = (weight * cross_entropy(states, act(self.actor, states), action)).mean()
        self.by_actor.descend(loss)
        return {"value": advantage.square().mean().item(), "cloning": loss.item()}
