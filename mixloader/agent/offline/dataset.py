"""Transitions of recorded runs and of simulated ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mixloader.agent.feature_maker import features_of
from mixloader.agent.offline.transitions import Transitions
from mixloader.agent.rollout import Rollout
from mixloader.agent.simulator import score
from mixloader.agent.trajectory import Trajectory

_LEAST = 1e-6  # of a weight in an action


def of_trajectory(trajectory: Trajectory) -> Transitions:
    """A recorded run: what the agent would have seen, what its policy did, and the rewards (Trajectory.rewards).

    The last decision has an effect only if the run goes on after it; decisions without one are left out.
    """
    table, size = trajectory.table, trajectory.meta.get("model_size")
    seen = features_of(table, trajectory.observations(), trajectory.preference, size)
    action = np.where(seen.active, np.maximum(trajectory.weights[1:], _LEAST), 0.0)
    action /= np.maximum(action.sum(axis=1, keepdims=True), _LEAST)
    kept = (trajectory.effect < trajectory.steps) & (seen.active.sum(axis=1) > 1)
    count = int(kept.sum())

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[kept])).float()

    return Transitions(
        tensor(seen.domain), tensor(seen.run), tensor(seen.weights), tensor(seen.prior),
        torch.from_numpy(seen.active[kept]), tensor(seen.limit), tensor(action), tensor(trajectory.rewards()),
        torch.arange(count - 1, -1, -1), tensor(seen.tokens), tensor(seen.budget),
    )  # fmt: skip


def of_trajectories(trajectories: Sequence[Trajectory]) -> Transitions:
    """Those of all, in their order."""
    return Transitions.join([of_trajectory(trajectory) for trajectory in trajectories])


def of_rollout(rollout: Rollout) -> Transitions:
    """Simulated runs: the decisions after each step but the last. Rewards: changes of the score in the next step."""
    episodes, decided = rollout.episodes, slice(0, rollout.steps - 1)
    reached = score(episodes, rollout.history.held_out)
    reward = np.diff(reached, axis=1)[:, 1:]
    tokens = np.arange(1.0, rollout.steps)  # in steps
    parts = []
    for b, size in enumerate(episodes.size):
        prior = np.broadcast_to(episodes.prior[b, :size], (rollout.steps - 1, size))

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).float()

        parts.append(
            Transitions(
                tensor(rollout.domain[b, decided, :size]), tensor(rollout.run[b, decided]),
                tensor(rollout.weights[b, decided, :size]), tensor(prior),
                torch.ones(rollout.steps - 1, int(size), dtype=torch.bool), tensor(rollout.limit[b, decided]),
                tensor(rollout.weights[b, 1:, :size]), tensor(reward[b]),
                torch.arange(rollout.steps - 2, -1, -1), tensor(tokens), tensor(rollout.known_budget()[b, decided]),
            )
        )  # fmt: skip
    return Transitions.join(parts)
