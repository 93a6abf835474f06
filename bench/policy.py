"""Micro-benchmarks of one decision of the agent: `pytest bench/policy.py --benchmark-json=out.json`.

Budget: 300 microseconds of one core at 64 domains, for `decide` from Observation to weights.
"""

import numpy as np
import pytest

from mixloader.agent.policy import Agent
from mixloader.observation import DomainTable, Observation, Signal


def _observation(n_domains: int) -> tuple[DomainTable, Observation]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(10**6, 10**8, n_domains)
    fields = tuple(("source", "target", None)[d % 3] for d in range(n_domains))
    names = tuple(f"d{d}" for d in range(n_domains))
    table = DomainTable(names, fields, (None,) * n_domains, tokens, tokens / tokens.sum())
    count = rng.integers(1, 10**4, n_domains)
    loss = Signal(rng.uniform(2, 4, n_domains), count, np.zeros(n_domains, dtype=np.int64))
    seen, weights = tokens // 10, rng.dirichlet(np.ones(n_domains))
    observation = Observation(
        step=99, effect_step=101, tokens=10**8, tokens_since=10**6, progress=0.1, weights=weights,
        seen=seen, epochs=seen / tokens, loss=loss, loss_std=np.full(n_domains, 2.4),
    )  # fmt: skip
    return table, observation


@pytest.mark.parametrize("n_domains", [2, 16, 64, 512, 4096])
def test_decide(benchmark, n_domains):
    table, observation = _observation(n_domains)
    agent = Agent()
    agent.reset(table)
    weights = benchmark(agent.decide, observation)
    assert abs(weights.sum() - 1) < 1e-9
