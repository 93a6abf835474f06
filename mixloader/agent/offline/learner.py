"""What all learners have in common: batches of transitions, an actor, a loss a step.

A learner is a file with a class that extends `Learner` and a line in `learners.py`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mixloader.agent.critic import Critic
from mixloader.agent.features import OF_SIGNALS
from mixloader.agent.network import feature_columns
from mixloader.agent.offline.proposals import move
from mixloader.agent.offline.transitions import States, Transitions

BATCH = 64
LEARNING_RATE = 1e-3
CLIP = 1.0  # norm of a gradient
QUIET = 0.3
"""Of the decisions of a batch, those that are shown without influence, and as many without feedback: the agent must do
without what a run does not measure."""

_COLUMNS = {signal: feature_columns(names) for signal, names in OF_SIGNALS.items()}


class Batch(NamedTuple):
    """numbers: of B decisions, int64 [B]. without: which of them are shown without a signal, bool [B] by its name."""

    numbers: Tensor
    without: dict[str, Tensor]


class Actor(Protocol):
    """A network that says for every domain how its log weight should move, before tanh; see `SetNetwork`."""

    def __call__(self, domain: Tensor, run: Tensor, weights: Tensor, prior: Tensor, mask: Tensor) -> Tensor: ...


def moves(actor: Actor, states: States) -> Tensor:
    """The actor's move of each log weight in [-1, 1] of the limit, [B, D], zero where padded."""
    out = torch.tanh(actor(states.domain, states.run, states.weights, states.prior, states.mask))
    return torch.where(states.mask, out, torch.zeros(()))


def act(actor: Actor, states: States) -> Tensor:
    """The mixtures that an actor asks for, [B, D]."""
    return move(states, moves(actor, states))


def cross_entropy(states: States, asked: Tensor, action: Tensor) -> Tensor:
    """Of the mixture that was asked for, relative to the one in the data, nats, [B].

    Unlike the likelihood of a Dirichlet it stays finite where a mixture is zero.
    """
    return -(action * torch.log(asked.clamp_min(1e-9))).sum(-1)


class Learner:
    """Improves `actor` in place, `learn` by `learn`.

    data: with rewards in units of the spread of runs' returns, so that constants mean the same whatever the data.
    updates: how often `learn` will be called; learning rates fall to nothing by then.
    """

    def __init__(self, data: Transitions, actor: nn.Module, seed: int, updates: int):
        self.data, self.actor, self.updates, self.done = data, actor, updates, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.by_actor = Optimizer(actor, updates)

    def learn(self) -> dict[str, float]:
        """One update on one batch; what is worth a look while it learns."""
        measured = self.update(self.batch())
        self.done += 1
        return measured

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from some decisions."""
        raise NotImplementedError

    def batch(self) -> Batch:
        """BATCH decisions, drawn with replacement."""
        index = torch.randint(len(self.data), (BATCH,), generator=self.generator)
        return Batch(index, {name: torch.rand(BATCH, generator=self.generator) < QUIET for name in _COLUMNS})

    def states(self, batch: Batch) -> States:
        """What is shown of them: features of a missing signal are 0."""
        states = self.data.states(batch.numbers)
        domain, run = states.domain.clone(), states.run.clone()
        for signal, (of_domain, of_run) in _COLUMNS.items():
            gone = batch.without[signal]
            domain[..., of_domain] = domain[..., of_domain].masked_fill(gone[:, None, None], 0.0)
            run[:, of_run] = run[:, of_run].masked_fill(gone[:, None], 0.0)
        return states._replace(domain=domain, run=run)


class Optimizer:
    """Adam with a cosine to nothing, and clipped gradients."""

    def __init__(self, network: nn.Module, updates: int):
        self._parameters = list(network.parameters())
        self._adam = torch.optim.Adam(self._parameters, lr=LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, updates)

    def descend(self, loss: Tensor) -> None:
        """One step."""
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._adam.step()
        self._schedule.step()


def new_critic(data: Transitions, seed: int) -> Critic:
    """A critic that standardises its inputs by the data's mean and deviation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic()
    there = data.domain[data.mask][:, critic.domain_columns], data.run[:, critic.run_columns]
    critic.centre.copy_(torch.cat([part.mean(0) for part in there]))
    # A feature that is nearly constant here may not be elsewhere: it is not blown up.
    critic.scale.copy_(torch.cat([part.std(0) for part in there]) + 0.05)
    return critic


class Slow:
    """Copies of networks that follow them slowly, so that targets do not run away (Lillicrap, arXiv 1509.02971)."""

    RATE = 0.005

    def __init__(self, networks: nn.ModuleList):
        self._fast = networks
        self.networks = copy.deepcopy(networks).requires_grad_(False)

    def follow(self) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.networks.parameters(), self._fast.parameters(), strict=True):
                slow.lerp_(fast, self.RATE)
