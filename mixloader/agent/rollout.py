"""The agent in the simulator: a batch of episodes, seen through the same features as a real run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mixloader.agent.action import CAP, FLOOR, act, bound, project, soft_step
from mixloader.agent.features import N_DOMAIN, N_GLOBAL, make_features
from mixloader.agent.memory import Measured, new_state, update_state
from mixloader.agent.network import Parameters, SetNetwork, forward
from mixloader.agent.simulator import Episodes, Simulator

Decide = Callable[["Watcher", Tensor], Tensor]
"""Next weights [B, D] from what was seen and the weights in force."""


class Watcher:
    """Keeps the agent's averages for every episode of a batch and makes its features.

    After `see`: domain float32 [B, D, P] and run float32 [B, G], zero where padded.
    """

    def __init__(self, episodes: Episodes, simulator: Simulator, budget_known: np.ndarray):
        self.episodes, self._simulator, self._budget_known = episodes, simulator, budget_known
        self.mask = episodes.mask
        self.sizes = episodes.mask.sum(1).tolist()
        self._states = [new_state(size) for size in self.sizes]
        self._tokens = (episodes.tokens * episodes.budget[:, None]).double().numpy().astype(np.int64)
        self.prior = episodes.prior.double().numpy()
        self.domain = np.zeros((*episodes.start.shape, N_DOMAIN), dtype=np.float32)
        self.run = np.zeros((len(episodes), N_GLOBAL), dtype=np.float32)
        self.limit = np.zeros(len(episodes))

    def see(self, seen: tuple[np.ndarray, np.ndarray, np.ndarray], weights: Tensor) -> None:
        """Take in what `Simulator.step` returned; weights are those in force."""
        loss, std, count = seen
        current = weights.detach().double().numpy()
        read = self._simulator.read.detach().double().numpy()
        for b, size in enumerate(self.sizes):
            budget = float(self.episodes.budget[b])
            tokens, since = budget * self._simulator.done / self._simulator.steps, budget / self._simulator.steps
            progress = tokens / budget if self._budget_known[b] else math.nan
            if not self._budget_known[b]:
                budget = 2 * tokens
            state, distinct = self._states[b], self._tokens[b, :size]
            missing = np.full((size, 2), math.nan)
            measured = Measured(
                loss[b, :size], std[b, :size], count[b, :size], missing, missing, missing, np.full(size + 2, math.nan)
            )
            update_state(state, measured, since, budget)
            was_read = (read[b, :size] * float(self.episodes.budget[b])).astype(np.int64)
            self.domain[b, :size], self.run[b] = make_features(
                state, current[b, :size], self.prior[b, :size], distinct, was_read, was_read / np.maximum(distinct, 1),
                self.episodes.field[b, :size].numpy(), progress, float(self.episodes.preference[b]), tokens, budget,
                math.nan,
            )  # fmt: skip
            self.limit[b] = bound(since, budget)

    def each(self, weights: Tensor, decide: Callable[[int, int, np.ndarray], np.ndarray]) -> Tensor:
        """Weights [B, D] from `decide(episode, number of domains, its weights)`, an episode at a time."""
        current = weights.detach().double().numpy()
        out = np.zeros_like(current)
        for b, size in enumerate(self.sizes):
            out[b, :size] = decide(b, size, current[b, :size])
        return torch.from_numpy(out).float()


def play(
    episodes: Episodes, steps: int, decide: Decide, rng: np.random.Generator, scores: list[Tensor] | None = None
) -> Simulator:
    """Run a batch of episodes from their priors to the end; one run in ten does not know its budget.

    Appends the score [B] after each step to `scores`.
    """
    simulator = Simulator(episodes, steps, rng)
    watcher = Watcher(episodes, simulator, rng.random(len(episodes)) > 0.1)
    weights = episodes.prior
    for step in range(steps):
        seen = simulator.step(weights)
        if scores is not None:
            scores.append(simulator.score())
        if step + 1 < steps:
            watcher.see(seen, weights)
            weights = decide(watcher, weights)
    return simulator


def by_parameters(parameters: Parameters) -> Decide:
    """The policy as users run it, fallback included. No gradients."""

    def decide(watcher: Watcher, weights: Tensor) -> Tensor:
        def one(b: int, size: int, current: np.ndarray) -> np.ndarray:
            domain, run, prior = watcher.domain[b, :size], watcher.run[b], watcher.prior[b, :size]
            u = forward(domain, run, current, prior, parameters)
            return act(u, domain, run, current, prior, watcher.limit[b], FLOOR, CAP, parameters)

        return watcher.each(weights, one)

    return decide


def by_network(network: SetNetwork, penalties: list[Tensor]) -> Decide:
    """The policy as it is fitted: without fallback, differentiable along the weights.

    No gradient flows through the features: each action is improved with the later ones held fixed. That is cheaper
    and steadier than differentiating the whole closed loop, and the features need no second implementation.
    Appends each decision's mean squared action to `penalties`.
    """

    def decide(watcher: Watcher, weights: Tensor) -> Tensor:
        domain, run = torch.from_numpy(watcher.domain.copy()), torch.from_numpy(watcher.run.copy())
        u = network(domain, run, weights.detach(), watcher.episodes.prior, watcher.mask)
        penalties.append((torch.tanh(u) ** 2)[watcher.mask].mean())
        limit = torch.from_numpy(watcher.limit).float()[:, None]
        moved = soft_step(u, weights, limit, watcher.mask)
        held = watcher.each(moved, lambda b, size, current: project(current, watcher.prior[b, :size], FLOOR, CAP))
        # Floor and cap pass gradients straight through, so that a domain at its floor can still learn to leave it.
        return moved + (held - moved).detach()

    return decide


def by_random_walk(rng: np.random.Generator) -> Decide:
    """Wanders over the simplex with the agent's own bounds: gives the features their ranges before any training."""
    drift: dict[int, np.ndarray] = {}

    def decide(watcher: Watcher, weights: Tensor) -> Tensor:
        def one(b: int, size: int, current: np.ndarray) -> np.ndarray:
            drift[b] = np.clip(0.9 * drift.get(b, np.zeros(size)) + 0.3 * rng.standard_normal(size), -1, 1)
            return project(current * np.exp(watcher.limit[b] * drift[b]), watcher.prior[b, :size], FLOOR, CAP)

        return watcher.each(weights, one)

    return decide
