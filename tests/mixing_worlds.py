"""Training in miniature, with a known best mixture: worlds for policies to act in, and the loop that runs one."""

from __future__ import annotations

import math

import numpy as np

from mixloader.observation import DomainTable, Observation, Signal

STEP_TOKENS = 1000


def table_of(n_domains, fields=None, tokens=None, prior=None):
    """A DomainTable with domains named a, b, c, ... ; even by default."""
    tokens = np.full(n_domains, 10**6) if tokens is None else np.asarray(tokens)
    prior = np.full(n_domains, 1 / n_domains) if prior is None else np.asarray(prior)
    names = tuple(chr(ord("a") + d) for d in range(n_domains))
    return DomainTable(names, fields or (None,) * n_domains, (None,) * n_domains, tokens, prior)


def observe(loss, weights=None, *, step=0, steps=1, lag=1, feedback=None, progress=math.nan, seen=None, **signals):
    """An Observation in which every loss was just measured, after `steps` steps of STEP_TOKENS each.

    signals: arrays by the Observation's names; NaN in `loss` and in them means never measured.
    """
    loss = np.asarray(loss, dtype=np.float64)
    n_domains = len(loss)
    weights = np.full(n_domains, 1 / n_domains) if weights is None else np.asarray(weights, dtype=np.float64)
    seen = np.round((step + 1) * STEP_TOKENS * weights).astype(np.int64) if seen is None else seen
    fields = signals.pop("influence_fields", ("source", "target"))
    extra = {
        name: _signal(np.asarray(value, dtype=np.float64)) if name in ("influence", "gram", "excess") else value
        for name, value in signals.items()
    }
    return Observation(
        step=step, effect_step=step + 1 + lag, tokens=(step + 1) * STEP_TOKENS, tokens_since=steps * STEP_TOKENS,
        progress=progress, weights=weights, seen=seen, epochs=seen / 10**6, loss=_signal(loss),
        loss_std=np.full(n_domains, 2.0),
        feedback={k: Signal(np.array(v), np.array(1), np.array(0)) for k, v in (feedback or {}).items()},
        influence_fields=fields if "influence" in extra else (), **extra,
    )  # fmt: skip


def _signal(value):
    known = np.isfinite(value)
    return Signal(value, np.where(known, 100, 0), np.where(known, 0, -1))


class LawWorld:
    """Losses fall by power laws in what was read: loss_i = floor_i + gain_i (1 + x_i / knee_i)^-power_i.

    x = transfer @ (steps read of each domain). transfer: [D, D], what a step of j is worth to i.
    """

    def __init__(self, floor, gain, knee, power, transfer=None, noise=0.0, seed=0):
        self.floor, self.gain, self.knee, self.power = (np.asarray(v, dtype=float) for v in (floor, gain, knee, power))
        self.transfer = np.eye(len(self.floor)) if transfer is None else np.asarray(transfer, dtype=float)
        self.read, self.noise, self.rng = np.zeros(len(self.floor)), noise, np.random.default_rng(seed)

    def losses(self, read=None):
        x = self.transfer @ (self.read if read is None else read)
        return self.floor + self.gain * (1 + x / self.knee) ** -self.power

    def train(self, weights):
        before = self.losses()
        self.read = self.read + weights
        return before + self.noise * self.rng.standard_normal(len(before))

    def signals(self):
        return {}


class GradientWorld:
    """A model theta that every domain pulls to its own centre: loss_k = |theta - c_k|^2 / 2, sampled rows add noise.

    fields: [F, m], the centres of the losses that count. Its gradient signals are exact, or of rows with `row_std`.
    """

    def __init__(self, centres, fields, rate=0.05, row_std=0.0):
        self.centres, self.fields = np.asarray(centres, dtype=float), np.asarray(fields, dtype=float)
        self.theta, self.rate = np.zeros(self.centres.shape[1]), rate
        self.row_var = np.broadcast_to(np.asarray(row_std, dtype=float) ** 2, len(self.centres))

    def losses(self):
        return ((self.theta - self.centres) ** 2).sum(axis=1) / 2

    def field_losses(self):
        return ((self.theta - self.fields) ** 2).sum(axis=1) / 2

    def train(self, weights):
        before = self.losses()
        self.theta = self.theta - self.rate * weights @ (self.theta - self.centres)
        return before

    def signals(self):
        g, g_field = self.theta - self.centres, self.theta - self.fields
        return {
            "influence": g @ g_field.T,
            "gram": g @ g.T,
            "row_norm_sq": (g**2).sum(axis=1) + self.row_var,
            "influence_fields": ("source", "target")[: len(self.fields)],
        }


def train(world, policy, table, steps, *, every=1, lag=1, evaluate=0, excess=None):
    """Run a policy in a world. Returns the weights of every step, float64 [steps, D].

    evaluate: report every domain's loss as feedback after every so many steps. excess: a function of the losses that
    gives the excess signal.
    """
    weights = policy.reset(table)
    weights = table.prior if weights is None else weights
    pending, path, recent, feedback = {}, [], [], {}
    read = np.zeros(len(table))
    for step in range(steps):
        weights = pending.pop(step, weights)
        path.append(weights)
        recent.append(world.train(weights))
        read = read + weights * STEP_TOKENS
        if evaluate and (step + 1) % evaluate == 0:
            feedback = dict(zip(table.names, world.losses(), strict=True))
        if (step + 1) % every == 0:
            signals = world.signals() | ({} if excess is None else {"excess": excess(world.losses())})
            effective = next(reversed(pending.values()), weights)
            observation = observe(
                np.mean(recent, axis=0), effective, step=step, steps=every, lag=lag, feedback=feedback,
                progress=(step + 1) / steps, seen=np.round(read).astype(np.int64), **signals,
            )  # fmt: skip
            answer = policy.decide(observation)
            if answer is not None:
                pending[step + 1 + lag] = answer / answer.sum()
            recent = []
    return np.array(path)
