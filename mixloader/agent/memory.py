"""What the agent remembers of a run: running averages of losses and influence, and what was told; compiled for numba.

The averages decay with the tokens read, not with the number of decisions, so that halving the interval between
decisions leaves them nearly the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixloader.agent.compiled import compiled

HORIZONS = np.array([0.02, 0.06, 0.18])
"""Horizons of the three running averages of a loss, as fractions of the run's token budget."""

FIRST = 0.004
"""A domain's first loss is the mean over its tokens up to this fraction of the budget."""

INFLUENCE_HORIZON = 0.15
"""Horizon of the running average of influence, whose snapshots are means over some time already."""

INFLUENCE_NOISE = 0.05
"""Least standard error that a snapshot is weighted with, as a part of its largest entry."""

FEEDBACK_HORIZON = 0.08
"""Horizon of the running average of feedback, with which the newest is compared for its slope."""

LOSS_ROWS, INFLUENCE_ROWS, FEEDBACK_ROWS = 11, 5, 5


class Measured(NamedTuple):
    """What an observation adds to the state; NaN (and 0 tokens) where nothing was measured since the last one.

    loss, loss_std: float64 [D], nats a token; loss_tokens: int64 [D], behind them.
    influence, influence_std: float64 [D, 2], on the source and on the target, as they stand (not only what is new);
    influence_age: float64 [D, 2], tokens of the run since they were measured.
    feedback: float64 [D + 2], nats a token: what was told of each domain, of the source and of the target.
    """

    loss: np.ndarray
    loss_std: np.ndarray
    loss_tokens: np.ndarray
    influence: np.ndarray
    influence_std: np.ndarray
    influence_age: np.ndarray
    feedback: np.ndarray


class State(NamedTuple):
    """What is remembered of a run; all float64.

    losses [11, D]: three sums of loss, three of tokens (decayed), the first loss's sum and tokens, the best loss, and
    the sum of squared deviations with its tokens (decayed).
    influence [5, 2, D]: newest value and standard error, age in tokens (inf: never), weighted sum and sum of weights
    (decayed). feedback [5, D + 2]: first, best, newest, running average, age in tokens (inf: never).
    """

    losses: np.ndarray
    influence: np.ndarray
    feedback: np.ndarray


def new_state(n_domains: int) -> State:
    """The state before the first observation."""
    state = State(
        np.zeros((LOSS_ROWS, n_domains)),
        np.zeros((INFLUENCE_ROWS, 2, n_domains)),
        np.zeros((FEEDBACK_ROWS, n_domains + 2)),
    )
    state.influence[2] = np.inf
    state.feedback[4] = np.inf
    return state


@compiled
def update_state(state, measured, tokens_since, budget):
    """Add what was measured, a Measured, to the State in place.

    tokens_since: tokens read by the run since the last observation; budget: tokens of the whole run.
    """
    _add_losses(state.losses, measured.loss, measured.loss_std, measured.loss_tokens, tokens_since, budget)
    _add_influence(
        state.influence, measured.influence, measured.influence_std, measured.influence_age, tokens_since, budget
    )
    _add_feedback(state.feedback, measured.feedback, tokens_since, budget)


@compiled
def _add_losses(state, loss, std, count, tokens_since, budget):
    elapsed = tokens_since / budget
    for d in range(state.shape[1]):
        measured = count[d] > 0 and np.isfinite(loss[d])
        for k in range(3):
            keep = np.exp(-elapsed / HORIZONS[k])
            state[k, d] *= keep
            state[3 + k, d] *= keep
            if measured:
                state[k, d] += loss[d] * count[d]
                state[3 + k, d] += count[d]
        keep = np.exp(-elapsed / HORIZONS[1])
        state[9, d] *= keep
        state[10, d] *= keep
        if not measured:
            continue
        if np.isfinite(std[d]):
            state[9, d] += std[d] ** 2 * count[d]
            state[10, d] += count[d]
        never = state[7, d] == 0
        if never or state[7, d] < FIRST * budget:
            state[6, d] += loss[d] * count[d]
            state[7, d] += count[d]
        # The middle average is quiet enough for its minimum to mean something.
        now = state[1, d] / state[4, d]
        state[8, d] = now if never else min(state[8, d], now)


@compiled
def _add_influence(state, value, std, age, tokens_since, budget):
    """Keep the newest snapshot, and add it to the average with its precision times the tokens it stands for.

    Precision is relative to the snapshot's largest entry: gradients shrink in a run, and later snapshots shall not
    outweigh earlier ones for that.
    """
    largest = 0.0
    for d in range(len(value)):
        for f in range(2):
            if np.isfinite(value[d, f]):
                largest = max(largest, abs(value[d, f]))
    keep = np.exp(-tokens_since / budget / INFLUENCE_HORIZON)
    for d in range(len(value)):
        for f in range(2):
            state[2, f, d] += tokens_since
            state[3, f, d] *= keep
            state[4, f, d] *= keep
            if not (np.isfinite(value[d, f]) and age[d, f] >= 0) or largest == 0.0:
                continue
            error = std[d, f] if np.isfinite(std[d, f]) else largest
            weight = tokens_since / budget / ((error / largest) ** 2 + INFLUENCE_NOISE**2)
            state[0, f, d] = value[d, f]
            state[1, f, d] = error
            state[2, f, d] = age[d, f]
            state[3, f, d] += weight * value[d, f]
            state[4, f, d] += weight


@compiled
def _add_feedback(state, told, tokens_since, budget):
    for d in range(len(told)):
        state[4, d] += tokens_since
        if not np.isfinite(told[d]):
            continue
        if state[4, d] == np.inf:
            for row in range(4):
                state[row, d] = told[d]
        keep = np.exp(-state[4, d] / budget / FEEDBACK_HORIZON) if state[4, d] < np.inf else 0.0
        state[1, d] = min(state[1, d], told[d])
        state[2, d] = told[d]
        state[3, d] = keep * state[3, d] + (1 - keep) * told[d]
        state[4, d] = 0.0
