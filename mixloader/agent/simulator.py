"""Continual pre-training in miniature: how losses of domains answer to a mixture, for fitting the agent.

Time is the part p of the token budget, in [0, 1]. A domain d has learned x_d effective tokens and forgotten
f_d + g_d nats, quickly and slowly; its held-out loss is

    loss_d = start_d - gain_d * (1 - (1 + x_d / knee_d)^-power_d) + f_d + g_d
    dx_d/dp = lr * sum_j transfer_dj * w_j * fresh_j          (fresh_j falls with the epochs of domain j)
    df_d/dp = lr * rate_d * ((1 - s_d) * (level_d - f_d) - hold_d * s_d * f_d),   s_d = sum_j similar_dj * w_j

and g_d as f_d, with a level and a rate of its own. So loss falls by a power law (Hestness et al., arXiv
1712.00409), repeated tokens are worth less (Muennighoff et al., arXiv 2305.16264), what is not practised is
forgotten towards a level, and practice brings it back. A domain and its two equal halves behave the same.

`run` goes forward in time, `pull_back` backward: the derivative of any sum over the held-out losses with respect to
the weights of every step and to the episodes' numbers, by the adjoint of each step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixloader.agent.compiled import compiled
from mixloader.agent.episodes import Episodes, blank
from mixloader.agent.features import SOURCE, TARGET

_FINEST = 32
"""A run is integrated in at least so many parts, however few its decisions are."""


class History(NamedTuple):
    """What happened in B runs of T steps of equal tokens, float64.

    held_out [B, T + 1, D], nats a token, first before training; at the bounds of the N parts in which the run is
    integrated: learned and read [B, N + 1, D] (effective tokens and tokens, in parts of the budget), forgotten
    [B, N + 1, D, 2] (nats).
    """

    held_out: np.ndarray
    learned: np.ndarray
    forgotten: np.ndarray
    read: np.ndarray


def new_history(episodes: Episodes, steps: int) -> History:
    """The beginning of runs of `steps` steps."""
    parts = steps * -(-_FINEST // steps)
    count, width = episodes.field.shape
    wide = (count, parts + 1, width)
    held_out = np.zeros((count, steps + 1, width))
    held_out[:, 0] = episodes.start
    return History(held_out, np.zeros(wide), np.zeros((*wide, 2)), np.zeros(wide))


@compiled
def learning_rate(e, b, p):
    """Of episode b at part p of its run, over its peak: warm-up, then a cosine to lr_end."""
    warmup = e.warmup[b]
    after = max(p - warmup, 0.0) / (1 - warmup)
    falling = e.lr_end[b] + (1 - e.lr_end[b]) * 0.5 * (1 + np.cos(np.pi * after))
    return min(p / max(warmup, 1e-6), falling)


@compiled
def _advance(e, b, weights, history, part):
    """One part of episode b, from bound `part` to the next, on weights [D]."""
    n, parts = e.size[b], history.learned.shape[1] - 1
    dt = 1.0 / parts
    scaled = learning_rate(e, b, (part + 0.5) * dt) * dt
    learned, read, forgotten = history.learned[b], history.read[b], history.forgotten[b]
    useful = np.empty(n)
    for j in range(n):
        over = read[part, j] / e.tokens[b, j] - 1
        useful[j] = weights[j] * np.exp(-over / e.wear[b]) if over > 0 else weights[j]
        read[part + 1, j] = read[part, j] + weights[j] * dt
    for i in range(n):
        gained, practice = 0.0, 0.0
        for j in range(n):
            gained += e.transfer[b, i, j] * useful[j]
            practice += e.similar[b, i, j] * weights[j]
        learned[part + 1, i] = learned[part, i] + scaled * gained
        practice = min(practice, 1.0)
        pull = 1 - practice + e.hold[b, i] * practice
        # Of what was gained, a part can be forgotten too: quickly, like the rest of it.
        reduction = e.gain[b, i] * (1 - (1 + learned[part, i] / e.knee[b, i]) ** -e.power[b, i])
        level = e.level[b, i, 0] + e.relearn[b] * reduction
        for k in range(2):
            # The exact solution over the part for constant weights: stable for any rate.
            rest = level * (1 - practice) / pull
            kept = np.exp(-e.rate[b, i, k] * scaled * pull)
            forgotten[part + 1, i, k] = rest + (forgotten[part, i, k] - rest) * kept
            level = e.level[b, i, 1]


@compiled
def step(e, weights, history, t):
    """Train every episode on weights[b, t], float64 [B, T, D], from step t to step t + 1, and write the history."""
    steps, parts = history.held_out.shape[1] - 1, history.learned.shape[1] - 1
    each = parts // steps
    for b in range(len(e.size)):
        for part in range(t * each, (t + 1) * each):
            _advance(e, b, weights[b, t], history, part)
        part = (t + 1) * each
        for i in range(e.size[b]):
            remaining = (1 + history.learned[b, part, i] / e.knee[b, i]) ** -e.power[b, i]
            worse = history.forgotten[b, part, i, 0] + history.forgotten[b, part, i, 1]
            history.held_out[b, t + 1, i] = e.start[b, i] - e.gain[b, i] * (1 - remaining) + worse


@compiled
def _run(e, weights, history):
    for t in range(weights.shape[1]):
        step(e, weights, history, t)


def run(episodes: Episodes, weights: np.ndarray) -> History:
    """Run episodes from start to end on weights float64 [B, T, D] (what is beyond `size` is not read)."""
    history = new_history(episodes, weights.shape[1])
    _run(episodes, np.ascontiguousarray(weights, dtype=np.float64), history)
    return history


@compiled
def influence_now(e, b, history, part, out):
    """Minus the derivative of the fields' mean probed loss by tokens of each domain at bound `part`: out [D, 2].

    Per part of the budget at the peak learning rate; columns: source, target. The probed loss changes by minus the sum
    of weight times influence: reading a domain of another field counts what is forgotten meanwhile, as the inner
    product of the gradients does.
    """
    n = e.size[b]
    fresh = np.empty(n)
    for j in range(n):
        fresh[j] = np.exp(-max(history.read[b, part, j] / e.tokens[b, j] - 1, 0.0) / e.wear[b])
    out[:] = 0.0
    for i in range(n):
        if e.probe[b, i] == 0:
            continue
        grown = 1 + history.learned[b, part, i] / e.knee[b, i]
        remaining = grown ** -e.power[b, i]
        slope = e.gain[b, i] * e.power[b, i] / e.knee[b, i] * remaining / grown
        level = e.level[b, i, 0] + e.relearn[b] * e.gain[b, i] * (1 - remaining)
        f, g = history.forgotten[b, part, i, 0], history.forgotten[b, part, i, 1]
        idle = e.rate[b, i, 0] * (level - f) + e.rate[b, i, 1] * (e.level[b, i, 1] - g)
        practised = e.hold[b, i] * (e.rate[b, i, 0] * f + e.rate[b, i, 1] * g)
        column = e.field[b, i] - SOURCE
        for j in range(n):
            s = e.similar[b, i, j]
            fall = slope * e.transfer[b, i, j] * fresh[j] - (1 - s) * idle + s * practised
            out[j, column] += e.probe[b, i] * fall


@compiled
def _back_part(e, b, weights, history, part, c_learned, c_forgotten, c_read, c_weights, grads, wanted):
    """Adjoint of `_advance`: cotangents of the state after the part become those of the state before it, in place.

    c_learned, c_read, c_weights [D], c_forgotten [D, 2]; c_weights and, if `wanted`, grads are added to.
    """
    n, parts = e.size[b], history.learned.shape[1] - 1
    dt = 1.0 / parts
    scaled = learning_rate(e, b, (part + 0.5) * dt) * dt
    fresh, over, c_useful = np.empty(n), np.empty(n), np.zeros(n)
    for j in range(n):
        over[j] = max(history.read[b, part, j] / e.tokens[b, j] - 1, 0.0)
        fresh[j] = np.exp(-over[j] / e.wear[b])
        c_weights[j] += c_read[j] * dt
    for i in range(n):
        practice = 0.0
        for j in range(n):
            practice += e.similar[b, i, j] * weights[j]
        clipped = practice > 1
        practice = min(practice, 1.0)
        hold = e.hold[b, i]
        pull = 1 - practice + hold * practice
        grown = 1 + history.learned[b, part, i] / e.knee[b, i]
        remaining = grown ** -e.power[b, i]
        reduction = e.gain[b, i] * (1 - remaining)
        c_pull, c_practice, c_reduction = 0.0, 0.0, 0.0
        for k in range(2):
            level = e.level[b, i, k] + (e.relearn[b] * reduction if k == 0 else 0.0)
            rest = level * (1 - practice) / pull
            kept = np.exp(-e.rate[b, i, k] * scaled * pull)
            c = c_forgotten[i, k]
            c_rest = c * (1 - kept)
            c_exponent = -c * (history.forgotten[b, part, i, k] - rest) * kept
            c_pull += c_exponent * e.rate[b, i, k] * scaled - c_rest * rest / pull
            c_practice -= c_rest * level / pull
            c_level = c_rest * (1 - practice) / pull
            c_forgotten[i, k] = c * kept
            if k == 0:
                c_reduction = c_level * e.relearn[b]
            if wanted:
                grads.level[b, i, k] += c_level
                grads.rate[b, i, k] += c_exponent * scaled * pull
                if k == 0:
                    grads.relearn[b] += c_level * reduction
        c_practice += c_pull * (hold - 1)
        if wanted:
            grads.hold[b, i] += c_pull * practice
        c_gained = c_learned[i] * scaled
        for j in range(n):
            c_useful[j] += e.transfer[b, i, j] * c_gained
            if not clipped:
                c_weights[j] += e.similar[b, i, j] * c_practice
            if wanted:
                grads.transfer[b, i, j] += c_gained * weights[j] * fresh[j]
                if not clipped:
                    grads.similar[b, i, j] += c_practice * weights[j]
        _back_reduction(e, b, i, history.learned[b, part, i], c_reduction, c_learned, grads, wanted)
    for j in range(n):
        c_weights[j] += c_useful[j] * fresh[j]
        if over[j] > 0:
            c_fresh = c_useful[j] * weights[j] * fresh[j]
            c_read[j] -= c_fresh / (e.wear[b] * e.tokens[b, j])
            if wanted:
                grads.wear[b] += c_fresh * over[j] / e.wear[b] ** 2


@compiled
def _back_reduction(e, b, i, learned, c, c_learned, grads, wanted):
    """Adjoint of gain * (1 - (1 + learned / knee)^-power), whose cotangent is c."""
    gain, knee, power = e.gain[b, i], e.knee[b, i], e.power[b, i]
    grown = 1 + learned / knee
    remaining = grown**-power
    slope = gain * power / knee * remaining / grown
    c_learned[i] += c * slope
    if wanted:
        grads.gain[b, i] += c * (1 - remaining)
        grads.knee[b, i] -= c * slope * learned / knee
        grads.power[b, i] += c * gain * remaining * np.log(grown)


@compiled
def _pull_back(e, weights, history, c_held_out, c_weights, grads, wanted):
    count, steps = weights.shape[:2]
    each = (history.learned.shape[1] - 1) // steps
    for b in range(count):
        n = e.size[b]
        c_learned, c_forgotten, c_read = np.zeros(n), np.zeros((n, 2)), np.zeros(n)
        for t in range(steps - 1, -1, -1):
            for i in range(n):
                c = c_held_out[b, t + 1, i]
                c_forgotten[i, 0] += c
                c_forgotten[i, 1] += c
                _back_reduction(e, b, i, history.learned[b, (t + 1) * each, i], -c, c_learned, grads, wanted)
                if wanted:
                    grads.start[b, i] += c
            for part in range((t + 1) * each - 1, t * each - 1, -1):
                _back_part(
                    e, b, weights[b, t], history, part, c_learned, c_forgotten, c_read, c_weights[b, t], grads, wanted
                )
        if wanted:
            for i in range(n):
                grads.start[b, i] += c_held_out[b, 0, i]


def pull_back(episodes: Episodes, weights: np.ndarray, history: History, cotangent: np.ndarray) -> np.ndarray:
    """The derivative of sum(cotangent * held_out) by the weights of every step, float64 [B, T, D].

    weights: those that made `history`; cotangent: float64 [B, T + 1, D].
    """
    out = np.zeros(weights.shape)
    _pull_back(episodes, weights, history, np.ascontiguousarray(cotangent), out, episodes, False)
    return out


def pull_back_all(
    episodes: Episodes, weights: np.ndarray, history: History, cotangent: np.ndarray
) -> tuple[np.ndarray, Episodes]:
    """As `pull_back`, and the derivatives by start, gain, knee, power, level, rate, hold, transfer, similar, relearn
    and wear, in Episodes whose other numbers are zero."""
    out, grads = np.zeros(weights.shape), blank(*episodes.field.shape)
    _pull_back(episodes, weights, history, np.ascontiguousarray(cotangent), out, grads, True)
    return out, grads


class _HeldOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, episodes):
        ctx.episodes, ctx.weights = episodes, np.ascontiguousarray(weights.detach().double().numpy())
        ctx.history = run(episodes, ctx.weights)
        return torch.from_numpy(ctx.history.held_out).to(weights.dtype)

    @staticmethod
    def backward(ctx, cotangent):
        grads = pull_back(ctx.episodes, ctx.weights, ctx.history, cotangent.double().numpy())
        return torch.from_numpy(grads).to(cotangent.dtype), None


def held_out(episodes: Episodes, weights: Tensor) -> Tensor:
    """Held-out losses [B, T + 1, D] of runs on weights [B, T, D], differentiable in the weights."""
    return _HeldOut.apply(weights, episodes)


def score(episodes: Episodes, held_out: np.ndarray) -> np.ndarray:
    """The balanced score at held-out losses [B, ..., D]: see `episodes.probe_weights`; nats, [B, ...]."""
    return np.einsum("b...d,bd->b...", episodes.start[_over(held_out)] - held_out, episodes.value)


def improvements(episodes: Episodes, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean fall of held-out loss [B, ..., D] over the probed domains of source and of target; 0 without any."""
    fall = episodes.start[_over(held_out)] - held_out
    source, target = (
        np.einsum("b...d,bd->b...", fall, np.where(episodes.field == code, episodes.probe, 0.0))
        for code in (SOURCE, TARGET)
    )
    return source, target


def _over(held_out: np.ndarray) -> tuple[slice | None, ...]:
    """Index that gives [B, D] the axes of [B, ..., D]."""
    return (slice(None), *(None,) * (held_out.ndim - 2), slice(None))
