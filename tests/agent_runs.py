"""Runs of the agent without a model: losses and other signals are given functions of the progress."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mixloader.agent.network import save_parameters
from mixloader.agent.policy import Agent
from mixloader.agent.transformer import HistoryNetwork
from mixloader.observation import DomainTable, Observation, Signal


def save_random(path, network):
    """Write a file of random weights that answer to all their features; returns its path."""
    torch.manual_seed(3)
    network.low.fill_(-8)
    network.high.fill_(12)
    network.scale.fill_(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if isinstance(network, HistoryNetwork):
        network.save(path)
    else:
        save_parameters(network.parameters_as_arrays(), path)
    return path


def make_table(n_domains, seed=0):
    rng = np.random.default_rng(seed)
    kinds = ["source", "target", *rng.choice(["source", "target", None], n_domains - 2, p=[0.5, 0.3, 0.2])]
    tokens = (1e5 * np.exp(rng.normal(0, 0.7, n_domains))).astype(np.int64)
    names = tuple(f"d{i}" for i in range(n_domains))
    return DomainTable(names, tuple(kinds), (None,) * n_domains, tokens, tokens / tokens.sum())


def permuted(table, order):
    pick = [int(i) for i in order]
    return DomainTable(
        tuple(table.names[i] for i in pick), tuple(table.fields[i] for i in pick), (None,) * len(pick),
        table.tokens[order], table.prior[order],
    )  # fmt: skip


def measured(influence=None, std=0.1, age=0, fields=("source", "target"), feedback=None, feedback_age=1, rows=10**9):
    """Keywords of an Observation. influence: [D, F] or None, NaN where not measured; age: in plan steps.

    rows: behind each entry of influence.
    """
    told = {
        name: Signal(np.array(value), np.array(1), np.array(feedback_age)) for name, value in (feedback or {}).items()
    }
    if influence is None:
        return {"feedback": told}
    influence = np.asarray(influence, dtype=np.float64)
    known = np.isfinite(influence)
    signal = Signal(influence, np.where(known, rows, 0), np.where(known, np.broadcast_to(age, influence.shape), -1))
    std = np.where(known, np.broadcast_to(std, influence.shape), np.nan)
    return {"feedback": told, "influence": signal, "influence_std": std, "influence_fields": fields}


class Run:
    """A run without a model: losses are a given function of (domain, progress), plus noise; closes the agent's loop.

    signals: function of progress that gives what else is measured, as keywords of `measured`.
    """

    def __init__(self, table, steps=60, losses=None, seed=0, every=1, signals=None, **options):
        self.table, self.steps, self.every = table, steps, every
        self.agent = Agent(**options)
        self.agent.reset(table)
        self.weights = table.prior.copy()
        self.seen = np.zeros(len(table), dtype=np.int64)
        self.step_tokens = 500_000 // steps
        noise = np.random.default_rng(seed).normal(0, 0.1, (steps, len(table)))
        self.losses = losses or (lambda p: 3.0 - 0.5 * p + noise[min(int(p * steps), steps - 1)])
        self.signals = signals or (lambda p: {})
        self.done = 0

    def observe(self, **changes):
        since = self.step_tokens * self.every
        count = np.floor(self.weights * since).astype(np.int64)
        self.seen = self.seen + count
        self.done += self.every
        progress = self.done / self.steps
        age = np.where(count > 0, 0, -1)
        loss = np.where(count > 0, np.broadcast_to(self.losses(progress), count.shape), np.nan)
        observation = Observation(
            step=self.done - 1, effect_step=self.done + 1, tokens=self.done * self.step_tokens, tokens_since=since,
            progress=progress, weights=self.weights, seen=self.seen, epochs=self.seen / self.table.tokens,
            loss=Signal(loss, count, age), loss_std=np.where(count > 0, 2.4, np.nan),
        )  # fmt: skip
        return replace(observation, **{**measured(**self.signals(progress)), **changes})

    def advance(self, decisions, **changes):
        for _ in range(decisions):
            self.weights = self.agent.decide(self.observe(**changes))
        return self.weights


def noisy_losses(n_domains, steps, seed):
    rng = np.random.default_rng(seed)
    paths = rng.uniform(2, 4, n_domains) + np.cumsum(rng.normal(-0.01, 0.08, (steps + 1, n_domains)), axis=0)
    return paths
