"""What all learners have in common: batches of transitions, an actor, a loss a step.

A learner is a file with a class that extends `Learner` and a line in `learners.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mixloader.agent.critic import Critic
from mixloader.agent.features import OF_SIGNALS
from mixloader.agent.network import feature_columns
from mixloader.agent.offline.proposals import move
from mixloader.agent.offline.transitions import Runs, States, Transitions
from mixloader.agent.transformer import HistoryNetwork

BATCH = 64
LEARNING_RATE = 1e-3
CLIP = 1.0  # norm of a gradient
QUIET = 0.3
"""Of the decisions of a batch, those that are shown without influence, and as many without feedback: the agent must do
without what a run does not measure."""
TOGETHER = 8
"""Decisions of a batch that are of one run where the actor reads its history: one pass over the run gives them all."""

_COLUMNS = {signal: feature_columns(names) for signal, names in OF_SIGNALS.items()}


class Batch(NamedTuple):
    """numbers: of B decisions, int64 [B]. without: which of them are shown without a signal, bool [B] by its name."""

    numbers: Tensor
    without: dict[str, Tensor]


class Actor(Protocol):
    """A network that says for every domain how its log weight should move, before tanh; see `SetNetwork`.

    A HistoryNetwork is one, too, which is shown whole runs instead.
    """

    def __call__(self, domain: Tensor, run: Tensor, weights: Tensor, prior: Tensor, mask: Tensor) -> Tensor: ...


def moves(actor: Actor, states: States) -> Tensor:
    """The actor's move of each log weight in [-1, 1] of the limit, [B, D], zero where padded."""
    if isinstance(actor, HistoryNetwork):
        seen, at = states.runs()
        out = actor(seen)[torch.arange(len(at))[:, None], at].flatten(0, 1)
    else:
        out = actor(*states[:5])
    return torch.where(states.mask, torch.tanh(out), torch.zeros(()))


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
        self._together = TOGETHER if isinstance(actor, HistoryNetwork) else 1

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
        together, runs = self._together, BATCH // self._together
        index = torch.randint(len(self.data), (runs,), generator=self.generator)
        if together > 1:
            index = self.data.beside(index, together, self.generator)
        # A run lacks a signal from its begin.
        gone = {name: torch.rand(runs, generator=self.generator) < QUIET for name in _COLUMNS}
        return Batch(index, {name: rows.repeat_interleave(together) for name, rows in gone.items()})

    def states(self, batch: Batch) -> States:
        """What is shown of them: features of a missing signal are 0."""
        states = self.data.states(batch.numbers, self._together)
        domain, run = _hidden(states.domain, states.run, batch.without)

        def runs() -> Runs:
            seen, at = states.runs()
            gone = {name: rows[:: self._together] for name, rows in batch.without.items()}
            domain, run = _hidden(seen.domain, seen.run, gone)
            return Runs(seen._replace(domain=domain, run=run), at)

        return states._replace(domain=domain, run=run, runs=runs)


def _hidden(domain: Tensor, run: Tensor, without: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The features [B, ..., P] and [B, ..., G], those of the signals that a row is without 0."""
    out = domain.clone(), run.clone()
    for signal, columns in _COLUMNS.items():
        for features, of_signal in zip(out, columns, strict=True):
            gone = without[signal].view(-1, *[1] * (features.dim() - 1))
            features[..., of_signal] = features[..., of_signal].masked_fill(gone, 0.0)
    return out


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
