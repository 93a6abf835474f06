"""Micro-benchmarks of one decision of every policy: `pytest bench/policy.py --benchmark-json=out.json`.

Budget: 300 microseconds of one core at 64 domains, for `decide` from Observation to weights, each policy in its
costliest ordinary state; the actor-critic is reported, not bound, and its curve ends at 512 domains.
"""

import dataclasses

import numpy as np
import pytest
import torch

from mixloader.agent.network import SetNetwork, save_parameters
from mixloader.agent.transformer import LONGEST, HistoryNetwork
from mixloader.observation import DomainTable, Observation, Signal
from mixloader.policies import make_policy, policy_names

DOMAINS = [2, 16, 64, 512, 4096]
BUDGET_S = 300e-6

SETS_ONCE = {"natural", "uniform", "fixed", "fields", "temperature"}
"""Their decide returns None."""

PAIRS = {"aioli", "skillit", "rb"}
"""What they hold or read grows with the square of the number of domains."""

NOT_BOUND = {"acodm"}

WARM, ROUNDS = 40, 200
"""Decisions before, and those that are timed, one by one: no observation comes twice."""


def _options(name: str, names: tuple[str, ...]) -> dict[str, object]:
    losses = dict.fromkeys(names, 1.5)
    return {
        "dbl": {"target_losses": losses},
        "velocitune": {"target_losses": losses},
        "doremi": {"reference_losses": losses},
        "fixed": {"weights": losses},
        "piecewise": {"knots": {0: losses}},
        "linear": {"knots": {0: losses, 10**6: losses}},
        "aioli": {"trial_steps": 10**9},  # in a sweep all the time
        "skillit": {"trial_steps": 10**9},
        "acodm": {"warmup_steps": 0},
        "ado": {"start_step": 99 + 16 * 30, "fit_steps": 10**9, "ignore_steps": 0},
    }.get(name, {})


def _observations(n_domains: int) -> tuple[DomainTable, list[Observation]]:
    """A table, and observations in a row, 16 plan steps each, that share the large arrays."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(10**6, 10**8, n_domains)
    fields = tuple(("source", "target", None)[d % 3] for d in range(n_domains))
    names = tuple(f"d{d}" for d in range(n_domains))
    table = DomainTable(names, fields, (None,) * n_domains, tokens, tokens / tokens.sum())
    count = rng.integers(1, 10**4, n_domains)
    zero = np.zeros(n_domains, dtype=np.int64)
    gradients = rng.normal(size=(n_domains, 8))
    square, two = (np.broadcast_to(np.int64(0), (n_domains, columns)) for columns in (n_domains, 2))
    one = np.broadcast_to(np.int64(1), square.shape)
    weights = rng.dirichlet(np.ones(n_domains)) * 0.9 + 0.1 / n_domains
    first = Observation(
        step=99, effect_step=101, tokens=10**8, tokens_since=16 * 10**6, progress=0.1, weights=weights / weights.sum(),
        seen=tokens // 10, epochs=np.full(n_domains, 0.1), loss=Signal(rng.uniform(2, 4, n_domains), count, zero),
        loss_std=np.full(n_domains, 2.4), influence=Signal(gradients @ gradients[:2].T, one[:, :2], two),
        influence_std=np.full((n_domains, 2), 0.1), influence_fields=("source", "target"),
        gram=Signal(gradients @ gradients.T, one, square), row_norm_sq=(gradients**2).sum(1) + 1,
        excess=Signal(rng.uniform(0, 1, n_domains), count, zero),
    )  # fmt: skip
    later = [
        dataclasses.replace(
            first, step=99 + i, effect_step=101 + i, tokens=10**8 + i * 10**6, seen=first.seen + i * count,
            loss=Signal(rng.uniform(2, 4, n_domains) + 50 / (i + 100), count, zero),
        )
        for i in range(0, 16 * (WARM + ROUNDS), 16)
    ]  # fmt: skip
    return table, later


def _cases():
    for name in policy_names():
        if name not in SETS_ONCE:
            yield from ((name, n) for n in DOMAINS if n <= 512 or name not in NOT_BOUND)


@pytest.mark.parametrize(("name", "n_domains"), list(_cases()))
def test_decide(benchmark, name, n_domains):
    table, observations = _observations(n_domains)
    policy = make_policy(name, **_options(name, table.names))
    policy.reset(table)
    for observation in observations[:WARM]:
        policy.decide(observation)
    following = iter(observations[WARM:])
    rounds = 10 if name in PAIRS and n_domains > 512 else 40 if name in NOT_BOUND else ROUNDS
    weights = benchmark.pedantic(policy.decide, setup=lambda: ((next(following),), {}), rounds=rounds)
    assert abs(weights.sum() - 1) < 1e-9
    if n_domains == 64 and name not in NOT_BOUND:
        assert benchmark.stats.stats.median <= BUDGET_S


@pytest.mark.parametrize("kind", ["set", "transformer"])
@pytest.mark.parametrize("n_domains", [n for n in DOMAINS if n <= 512])
def test_agent_with_all_signals(benchmark, tmp_path, kind, n_domains):
    """The agent with weights that read influence and feedback, of as many units as it would ship with.

    Every domain and field is told anew at each tenth decision. The Transformer, with a full history, is reported.
    """
    torch.manual_seed(0)
    path = tmp_path / "agent.safetensors"
    network = SetNetwork(hidden=64) if kind == "set" else HistoryNetwork()
    network.low.fill_(-8)
    network.high.fill_(25)
    if isinstance(network, SetNetwork):
        save_parameters(network.parameters_as_arrays(), path)
    else:
        network.save(path)
    table, observations = _observations(n_domains)
    told = [
        {
            name: Signal(np.array(2.0), np.array(1), np.array(1 + 16 * age))
            for name in (*table.names, "source", "target")
        }
        for age in range(10)
    ]
    observations = [dataclasses.replace(o, feedback=told[i % 10]) for i, o in enumerate(observations)]
    policy = make_policy("agent", parameters=path, model_size=1e8)
    policy.reset(table)
    for observation in observations[: -(-LONGEST // 2) + WARM]:
        policy.decide(observation)
    following = iter(observations[-(-LONGEST // 2) + WARM :])
    rounds = ROUNDS - LONGEST if kind == "set" else 10
    benchmark.pedantic(policy.decide, setup=lambda: ((next(following),), {}), rounds=rounds)
    if n_domains == 64 and kind == "set":
        assert benchmark.stats.stats.median <= BUDGET_S


@pytest.mark.parametrize("n_domains", DOMAINS)
def test_ado_fit(benchmark, n_domains):
    """The decision in which ADO fits its laws, which is one in `fit_steps`."""
    table, observations = _observations(n_domains)
    policy = make_policy("ado", start_step=99 + 16 * 30, fit_steps=1, ignore_steps=0)
    policy.reset(table)
    for observation in observations[:WARM]:
        policy.decide(observation)
    following = iter(observations[WARM:])
    weights = benchmark.pedantic(policy.decide, setup=lambda: ((next(following),), {}), rounds=ROUNDS)
    assert abs(weights.sum() - 1) < 1e-9
    if n_domains == 64:
        assert benchmark.stats.stats.median <= BUDGET_S


@pytest.mark.parametrize("n_domains", [n for n in DOMAINS if n <= 512])
def test_sweep_solve(benchmark, n_domains):
    """The solution at the end of a sweep, which is one decision in a round."""
    table, observations = _observations(n_domains)
    policy = make_policy("aioli", trial_steps=10**9)
    policy.reset(table)
    for observation in observations[:WARM]:
        policy.decide(observation)
    benchmark(policy.sweep.solve, np.ones(n_domains, dtype=bool))
    if n_domains == 64:
        assert benchmark.stats.stats.median <= BUDGET_S
