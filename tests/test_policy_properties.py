"""What holds for every policy of the registry; one that is registered later is tested by being there."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import shipped_policies

from mixloader.agent import behaviours  # noqa: F401  (registers two more)
from mixloader.errors import StateError
from mixloader.observation import DomainTable, Observation, Signal
from mixloader.policies import Policy, make_policy

LOSSES = {"a": 2.0, "b": 3.0, "d1": 1.5}
REQUIRED = {
    "fixed": {"weights": {"a": 1.0, "b": 2.0}},
    "piecewise": {"knots": {0: {"a": 1.0}, 5: {"b": 1.0}}},
    "linear": {"knots": {0: {"a": 1.0, "b": 1.0}, 50: {"b": 1.0}}},
    "dbl": {"target_losses": LOSSES},
    "velocitune": {"target_losses": LOSSES},
    "doremi": {"reference_losses": LOSSES},
}
"""Options that a policy cannot do without."""

QUICK = {
    "ado": {"start_step": 4, "fit_steps": 3, "ignore_steps": 0},
    "aioli": {"trial_steps": 1, "rounds": 1, "update_steps": 12},
    "skillit": {"trial_steps": 1, "rounds": 1, "update_steps": 2},
    "acodm": {"warmup_steps": 6, "updates": 1, "batch": 8},
}
"""Options that bring a policy to all its parts within the few decisions of a test."""

SETS_ALL = {"natural", "uniform", "fixed", "fields", "temperature", "piecewise", "linear", "walk", "perturbed"}
"""Mixtures that follow no measurement and do not look at the weights that there are."""

TRIES = {"aioli", "skillit"}
"""Policies that try mixtures: a trial reads a domain that was never measured, too."""


def build(name):
    return make_policy(name, **{**REQUIRED.get(name, {}), **QUICK.get(name, {})})


def draw_table(rng, n_domains):
    names = ("a", "b", *(f"d{i}" for i in range(1, n_domains - 1)))
    fields = ("source", "target", *rng.choice(["source", "target", "none"], n_domains - 2))
    fields = tuple(None if field == "none" else str(field) for field in fields)
    tokens = rng.integers(10**4, 10**7, n_domains)
    prior = rng.dirichlet(np.ones(n_domains)) * 0.9 + 0.1 / n_domains
    return DomainTable(names, fields, (None,) * n_domains, tokens, prior / prior.sum())


class Run:
    """A random run over a table: observations in which anything may be missing."""

    def __init__(self, rng, table, unread=(), zero=()):
        self.rng, self.table, self.unread, self.zero = rng, table, list(unread), list(zero)
        self.step, self.tokens = -1, 0
        n_domains = len(table)
        self.weights = table.prior.copy()
        self.weights[self.zero] = 0
        self.weights /= self.weights.sum()
        self.seen = np.zeros(n_domains, dtype=np.int64)
        self.loss, self.age = np.full(n_domains, math.nan), np.full(n_domains, -1)
        self.ever = rng.random() < 0.8  # whether gradients are measured at all

    def observe(self):
        rng, n_domains = self.rng, len(self.table)
        steps = int(rng.integers(1, 4))
        self.step += steps
        read = rng.multinomial(steps * 64, self.weights) * 1000
        read[self.unread] = 0
        self.seen = self.seen + read
        since = int(read.sum())
        self.tokens += since
        fresh = read > 0
        self.loss = np.where(fresh, rng.uniform(0.5, 5, n_domains), self.loss)
        self.age = np.where(fresh, 0, np.where(self.age >= 0, self.age + steps, -1))
        known = self.age >= 0
        rows = rng.normal(size=(n_domains, 6))
        fields = rng.normal(size=(6, 2))
        gram = np.where(known[:, None] & known, rows @ rows.T, math.nan)
        influence = np.where(known[:, None], rows @ fields, math.nan)
        influence[:, rng.random(2) < 0.15] = math.nan
        some = self.ever and rng.random() < 0.9
        feedback = {}
        for name in ("source", "target", *(n for n, k in zip(self.table.names, known, strict=True) if k)):
            if rng.random() < 0.3:
                feedback[name] = Signal(np.array(rng.uniform(0.5, 5)), np.array(1), np.array(int(rng.integers(0, 3))))
        return Observation(
            step=self.step, effect_step=self.step + 2, tokens=self.tokens, tokens_since=since,
            progress=min(1.0, self.tokens / 10**7), weights=self.weights, seen=self.seen,
            epochs=self.seen / self.table.tokens, loss=Signal(self.loss, np.where(fresh, read, 0), self.age),
            loss_std=np.where(known, 1.5, math.nan), feedback=feedback,
            influence=self._signal(influence, known[:, None]) if some else None,
            influence_std=np.where(np.isfinite(influence), 0.1, math.nan) if some else None,
            influence_fields=("source", "target") if some else (),
            gram=self._signal(gram, known[:, None] & known) if some else None,
            row_norm_sq=np.where(known, (rows**2).sum(1) * 3, math.nan) if some else None,
            excess=Signal(np.where(known, rng.uniform(0, 1, n_domains), math.nan), read, self.age),
        )  # fmt: skip

    @staticmethod
    def _signal(value, known):
        known = np.broadcast_to(known, value.shape) & np.isfinite(value)
        return Signal(value, np.where(known, 9, 0), np.where(known, 0, -1))


def permuted(thing, order):
    """A DomainTable, Signal or Observation with its domains in another order."""
    values = {}
    for entry in dataclasses.fields(thing):
        value = getattr(thing, entry.name)
        if isinstance(value, Signal):
            square = value.value.ndim == 2 and value.value.shape[0] == value.value.shape[1] and entry.name == "gram"
            axes = np.ix_(order, order) if square else order
            value = Signal(value.value[axes], value.count[axes], value.age[axes])
        elif isinstance(value, np.ndarray):
            value = value[order]
        elif isinstance(value, tuple) and entry.name != "influence_fields":
            value = tuple(value[i] for i in order)
        values[entry.name] = value
    return type(thing)(**values)


def arrays_of(observation):
    yield from (observation.weights, observation.seen, observation.epochs, observation.loss_std)
    for signal in (observation.loss, observation.influence, observation.gram, observation.excess):
        if signal is not None:
            yield from (signal.value, signal.count, signal.age)


@pytest.mark.parametrize("name", shipped_policies())
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), n_domains=st.integers(3, 7))
def test_every_policy(name, seed, n_domains):
    """Simplex, permutation, state: over one random run, with domains never read and domains at zero."""
    rng = np.random.default_rng(seed)
    table = draw_table(rng, n_domains)
    unread = [n_domains - 1] if n_domains > 3 and seed % 2 else []
    zero = [n_domains - 2] if n_domains > 4 and seed % 3 == 0 else []
    run, order = Run(rng, table, unread, zero), rng.permutation(n_domains)
    policy, other = build(name), build(name)
    assert isinstance(policy, Policy)
    first, first_other = policy.reset(table), other.reset(permuted(table, order))
    assert (first is None) == (first_other is None)
    if first is not None:
        assert first.shape == (n_domains,)
        assert abs(first.sum() - 1) < 1e-9
        np.testing.assert_allclose(first_other, first[order], atol=1e-9)
        if name in SETS_ALL:
            run.weights = first
    for decision in range(14):
        observation = run.observe()
        before = [array.copy() for array in arrays_of(observation)]
        if decision in (3, 9):  # a resume must go on as if nothing had happened
            state = policy.state_dict()
            policy = build(name)
            policy.reset(table)
            policy.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
            assert json.dumps(policy.state_dict()) == json.dumps(state)
            twin = build(name)
            twin.reset(table)
            twin.load_state_dict(state)
            expected = twin.decide(observation)
        answer = policy.decide(observation)
        if decision in (3, 9):
            np.testing.assert_array_equal(answer, expected)
        for array, was in zip(arrays_of(observation), before, strict=True):
            np.testing.assert_array_equal(array, was)
        theirs = other.decide(permuted(observation, order))
        assert (answer is None) == (theirs is None)
        if answer is None:
            continue
        assert answer.shape == (n_domains,)
        assert answer.dtype == np.float64
        assert np.isfinite(answer).all()
        assert answer.min() >= 0
        assert abs(answer.sum() - 1) < 1e-6
        np.testing.assert_allclose(theirs, answer[order], atol=1e-4 if name == "acodm" else 1e-8)
        if name not in SETS_ALL:
            assert (answer[zero] == 0).all()
            if name not in TRIES | {"agent", "unimax"}:
                np.testing.assert_allclose(answer[unread], run.weights[unread], atol=1e-9)
            run.weights = answer / answer.sum()


def test_a_state_of_other_domains_is_refused():
    rng = np.random.default_rng(0)
    small, large = draw_table(rng, 3), draw_table(rng, 5)
    for name in shipped_policies():
        policy, other = build(name), build(name)
        policy.reset(small)
        run = Run(rng, small)
        for _ in range(6 if name not in SETS_ALL else 1):
            policy.decide(run.observe())
        state = policy.state_dict()
        if len(json.dumps(state)) < 40:
            continue  # holds nothing that belongs to domains
        other.reset(large)
        with pytest.raises(StateError):
            other.load_state_dict(state)


def test_states_fit_a_checkpoint():
    """A full checkpoint is to stay under 16 KB at 16 domains; what a sweep or an actor-critic holds is larger."""
    rng = np.random.default_rng(0)
    table = draw_table(rng, 16)
    for name in shipped_policies():
        policy, run = build(name), Run(rng, table)
        policy.reset(table)
        for _ in range(150):
            policy.decide(run.observe())
        limit = {"acodm": 600, "aioli": 24, "skillit": 24}.get(name, 8)
        assert len(json.dumps(policy.state_dict())) < limit * 1024, name
