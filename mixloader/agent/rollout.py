"""The agent in the simulator: a batch of episodes, seen through the same features as a real run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixloader.agent.action import CAP, FLOOR, act, bound, project
from mixloader.agent.compiled import compiled
from mixloader.agent.episodes import Episodes
from mixloader.agent.features import N_DOMAIN, N_GLOBAL, make_features
from mixloader.agent.memory import (
    FEEDBACK_ROWS,
    INFLUENCE_ROWS,
    LOSS_ROWS,
    Measured,
    State,
    new_state,
    update_state,
)
from mixloader.agent.network import Parameters, Ranges, forward
from mixloader.agent.signals import Signals, new_readings, read
from mixloader.agent.simulator import new_history, step

Decide = Callable[["Rollout", int], np.ndarray]
"""The network's numbers, float32 [B, D], for the decision after step t of a Rollout."""


class Rollout:
    """B episodes of T steps under a policy, and all that it saw and did.

    weights: float64 [B, T, D], in force in each step; history: what came of it. Of the decision after step t:
    domain float32 [B, T, D, P] and run float32 [B, T, G], the features; limit float64 [B, T], the bound on a change of
    log weight; actions float32 [B, T, D], the network's numbers. Zero or NaN where padded and after the last step.
    """

    def __init__(self, episodes: Episodes, signals: Signals, steps: int, rng: np.random.Generator):
        count, width = episodes.field.shape
        self.episodes, self.signals, self.steps, self._rng = episodes, signals, steps, rng
        self.history = new_history(episodes, steps)
        self.weights = np.zeros((count, steps, width))
        self.weights[:, 0] = episodes.prior
        self.domain = np.zeros((count, steps, width, N_DOMAIN), dtype=np.float32)
        self.run = np.zeros((count, steps, N_GLOBAL), dtype=np.float32)
        self.limit = np.zeros((count, steps))
        self.actions = np.zeros((count, steps, width), dtype=np.float32)
        self.readings = new_readings(episodes, rng)
        # Each episode's State in the first entries of its row: a state of its size, in one piece.
        self._state = State(
            np.zeros((count, LOSS_ROWS * width)),
            np.zeros((count, INFLUENCE_ROWS * 2 * width)),
            np.zeros((count, FEEDBACK_ROWS * (width + 2))),
        )
        for b, size in enumerate(episodes.size):
            for rows, part in zip(self._state, new_state(int(size)), strict=True):
                rows[b, : part.size] = part.ravel()

    def advance(self, t: int) -> None:
        """Train step t on its weights; unless it is the last, look at what came of it."""
        step(self.episodes, self.weights, self.history, t)
        if t + 1 < self.steps:
            read(self.episodes, self.signals, self.history, self.weights, t, self._rng, self.readings)
            _look(
                self.episodes, self.signals, self.readings, self.history.read, self.weights, t, self._state,
                self.domain, self.run, self.limit,
            )  # fmt: skip

    def known_budget(self) -> np.ndarray:
        """In steps, as far as is known at each decision: without a budget the run is always half done; [B, T]."""
        return np.where(self.signals.budget_known[:, None], self.steps, 2.0 * np.arange(1, self.steps + 1))

    def act(self, t: int, actions: np.ndarray, fallback: Parameters | Ranges | None = None) -> None:
        """Set the weights of step t + 1 from the network's numbers; led back to the prior where the features are far
        outside the ranges of `fallback`."""
        self.actions[:, t] = actions
        if fallback is None:
            _move(self.episodes, self.actions, self.limit, self.weights, t)
        else:
            _act(self.episodes, self.actions, self.domain, self.run, self.limit, self.weights, t, fallback)


@compiled
def _look(e, signals, readings, history_read, weights, t, states, domain, run, limit):
    """Features of what the Readings say after step t, into domain, run and limit."""
    steps, parts = weights.shape[1], history_read.shape[1] - 1
    for b in range(len(e.size)):
        n, budget = e.size[b], e.budget[b]
        tokens, since, progress = budget * (t + 1) / steps, budget / steps, (t + 1) / steps
        distinct, seen, epochs = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64), np.empty(n)
        for d in range(n):
            distinct[d] = int(e.tokens[b, d] * budget)
            seen[d] = int(history_read[b, (t + 1) * (parts // steps), d] * budget)
            epochs[d] = seen[d] / max(distinct[d], 1)
        if not signals.budget_known[b]:
            progress, budget = np.nan, 2 * tokens
        limit[b, t] = bound(since, budget)
        state = State(
            states.losses[b, : LOSS_ROWS * n].reshape((LOSS_ROWS, n)),
            states.influence[b, : INFLUENCE_ROWS * 2 * n].reshape((INFLUENCE_ROWS, 2, n)),
            states.feedback[b, : FEEDBACK_ROWS * (n + 2)].reshape((FEEDBACK_ROWS, n + 2)),
        )
        measured = Measured(
            readings.loss[b, :n], readings.loss_std[b, :n], readings.tokens[b, :n], readings.influence[b, :n],
            readings.influence_std[b, :n], readings.influence_age[b, :n], readings.feedback[b, : n + 2],
        )  # fmt: skip
        update_state(state, measured, since, budget)
        domain[b, t, :n], run[b, t] = make_features(
            state, weights[b, t, :n], e.prior[b, :n], distinct, seen, epochs, e.field[b, :n], progress,
            e.preference[b], tokens, budget, signals.log_size[b],
        )  # fmt: skip


@compiled
def _move(e, actions, limit, weights, t):
    for b in range(len(e.size)):
        n = e.size[b]
        moved = np.empty(n)
        for d in range(n):
            moved[d] = weights[b, t, d] * np.exp(limit[b, t] * np.tanh(np.float64(actions[b, t, d])))
        weights[b, t + 1, :n] = project(moved, e.prior[b, :n], FLOOR, CAP)


@compiled
def _act(e, actions, domain, run, limit, weights, t, p):
    for b in range(len(e.size)):
        n, current = e.size[b], weights[b, t]
        weights[b, t + 1, :n] = act(
            actions[b, t, :n], domain[b, t, :n], run[b, t], current[:n], e.prior[b, :n], limit[b, t], FLOOR, CAP, p
        )


@compiled
def _forward(e, domain, run, weights, t, p, out):
    for b in range(len(e.size)):
        n = e.size[b]
        out[b, :n] = forward(domain[b, t, :n], run[b, t], weights[b, t, :n], e.prior[b, :n], p)


@compiled
def _back(e, actions, limit, weights, c_weights, c_actions):
    for b in range(len(e.size)):
        n, steps = e.size[b], weights.shape[1]
        later = c_weights[b, steps - 1, :n].copy()
        moved, push = np.empty(n), np.empty(n)
        for t in range(steps - 2, -1, -1):
            total, inner = 0.0, 0.0
            for d in range(n):
                push[d] = np.tanh(np.float64(actions[b, t, d]))
                moved[d] = weights[b, t, d] * np.exp(limit[b, t] * push[d])
                total += moved[d]
                inner += moved[d] * later[d]
            for d in range(n):
                c_log = moved[d] / total * (later[d] - inner / total)
                c_actions[b, t, d] = c_log * limit[b, t] * (1 - push[d] ** 2)
                later[d] = c_log / weights[b, t, d] + c_weights[b, t, d]


def back_to_actions(rollout: Rollout, cotangent: np.ndarray) -> np.ndarray:
    """From a derivative by the weights of each step, float64 [B, T, D], that by the network's numbers, of same shape.

    Along the weights: a move carries on into all later weights. The features are held fixed: each action is improved
    with the later ones as they are, which is cheaper and steadier than differentiating the whole closed loop. Floor and
    cap pass derivatives straight through, so that a domain at its floor can still learn to leave it.
    """
    out = np.zeros_like(cotangent)
    _back(rollout.episodes, rollout.actions, rollout.limit, rollout.weights, cotangent, out)
    return out


def play(
    episodes: Episodes,
    signals: Signals,
    steps: int,
    decide: Decide,
    rng: np.random.Generator,
    fallback: Parameters | Ranges | None = None,
) -> Rollout:
    """Run a batch of episodes from their priors to the end. Deterministic given `rng`."""
    rollout = Rollout(episodes, signals, steps, rng)
    for t in range(steps):
        rollout.advance(t)
        if t + 1 < steps:
            rollout.act(t, decide(rollout, t), fallback)
    return rollout


def by_parameters(parameters: Parameters) -> Decide:
    """The network, compiled."""

    def decide(rollout: Rollout, t: int) -> np.ndarray:
        out = np.zeros(rollout.actions.shape[::2], dtype=np.float32)
        _forward(rollout.episodes, rollout.domain, rollout.run, rollout.weights, t, parameters, out)
        return out

    return decide


def by_random_walk(rng: np.random.Generator) -> Decide:
    """Wanders over the simplex with the agent's own bounds: gives the features their ranges before any training."""
    drift: list[np.ndarray] = []

    def decide(rollout: Rollout, t: int) -> np.ndarray:
        last = drift.pop() if drift else np.zeros(rollout.actions.shape[::2])
        drift.append(np.clip(0.9 * last + 0.3 * rng.standard_normal(last.shape), -0.999, 0.999))
        return np.arctanh(drift[0]).astype(np.float32)

    return decide
