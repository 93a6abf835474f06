"""Either of the agent's networks in the simulator: what decides, and the derivative by which it is fitted."""

import json

import numpy as np
import pytest
import torch

from mixloader.agent import fit
from mixloader.agent.action import FLOOR, soft_step
from mixloader.agent.episodes import draw, mask, take
from mixloader.agent.network import SetNetwork
from mixloader.agent.networks import NETWORKS, kind_of, load_network
from mixloader.agent.policy import SHIPPED, Agent
from mixloader.agent.rollout import play
from mixloader.agent.signals import draw_signals
from mixloader.agent.simulator import run, score
from mixloader.agent.transformer import LONGEST, History, HistoryNetwork


def new_history(size=1.0):
    """A small one whose numbers are about as large as `size`."""
    torch.manual_seed(0)
    network = HistoryNetwork(hidden=16, heads=2)
    fit.measure_features(network, np.random.default_rng(0), episodes=8)
    with torch.no_grad():
        network.head.weight.mul_(20 * size)
    return network


def played(network, steps, count=3):
    """A rollout of small episodes, of which some have no budget."""
    rng = np.random.default_rng(2)
    episodes = draw(64, rng)
    few = take(episodes, np.flatnonzero(episodes.size < 7)[:count])
    signals = draw_signals(few, steps, rng)
    signals.budget_known[:] = np.arange(count) > 0
    return play(few, signals, steps, kind_of(network).decide(network), rng)


def answers(network, rollout, b):
    """The numbers that the policy's history gives on an episode, float32 [T - 1, size]."""
    size = int(rollout.episodes.size[b])
    history, prior, out = History(network, size), rollout.episodes.prior[b, :size], []
    for t in range(rollout.steps - 1):
        budget = rollout.steps if rollout.signals.budget_known[b] else 2 * (t + 1)
        seen = rollout.domain[b, t, :size], rollout.run[b, t], rollout.weights[b, t, :size]
        out.append(history.answer(*seen, prior, t + 1, budget))
    return np.array(out)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [24, 2 * LONGEST + 12])
def test_the_transformer_decides_in_rollouts_as_the_policy_does(steps):
    """Also where the history is so long that it is thinned, twice, and where no budget is known."""
    network = new_history()
    rollout = played(network, steps)
    for b, size in enumerate(rollout.episodes.size):
        decided = rollout.actions[b, : steps - 1, :size]
        assert np.ptp(decided) > 0.1
        np.testing.assert_allclose(decided, answers(network, rollout, b), atol=0.01 * np.abs(decided).max())
        # At once, too, for the gradient: without half precision in between.
        whole = kind_of(network).numbers(network, rollout, np.array([b]), np.arange(steps - 1))[0]
        np.testing.assert_allclose(decided, whole.detach(), atol=1e-4)


def objective(network, rollout):
    """What `policy_gradient` differentiates, anew: the features are those of the rollout, the weights are not."""
    episodes, steps = rollout.episodes, rollout.steps
    weights, penalty = rollout.weights.copy(), 0.0
    for b, size in enumerate(episodes.size):
        there = torch.ones(1, int(size), dtype=torch.bool)
        u = torch.from_numpy(answers(network, rollout, b)).double()
        limit = torch.from_numpy(rollout.limit[b])
        for t in range(steps - 1):
            now = torch.from_numpy(weights[b, t, :size])[None]
            weights[b, t + 1, :size] = soft_step(u[None, t], now, limit[t].view(1, 1), there)[0]
        penalty += fit.PENALTY * torch.tanh(u).square().mean().item() / len(episodes.size)
    assert (weights > FLOOR * episodes.prior[:, None])[np.repeat(mask(episodes)[:, None], steps, 1)].all()
    reached = score(episodes, run(episodes, weights).held_out)[:, 1:]
    return ((1 - fit.UNDERWAY) * reached[:, -1] + fit.UNDERWAY * reached.mean(1)).mean() - penalty


def test_the_gradient_of_the_transformer_is_that_of_the_objective():
    """Along itself, by central differences, on runs of which the end no longer shows all of the begin."""
    network = new_history(size=0.1)
    rollout = played(network, LONGEST + 8)
    found = fit.policy_gradient(network, rollout, np.random.default_rng(0))
    norm = torch.cat([part.flatten() for part in found]).norm().item()
    assert all(part.abs().max() > 0 for part in found)
    values, tiny = [], 2e-3
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, part in zip(network.parameters(), found, strict=True):
                parameter.add_(part, alpha=sign * tiny / norm)
        values.append(objective(network, rollout))
        with torch.no_grad():
            for parameter, part in zip(network.parameters(), found, strict=True):
                parameter.sub_(part, alpha=sign * tiny / norm)
    assert (values[0] - values[1]) / (2 * tiny) == pytest.approx(norm, rel=0.02)


@pytest.mark.slow
def test_a_short_fit_of_the_transformer_improves_the_score():
    network = fit.fit(seed=0, iterations=25, batch=32, kind="transformer")
    scores = fit.evaluate(network, seed=5, count=128, oracles=False)
    agent, prior = scores["agent"], scores["prior"]
    assert agent["score"] > prior["score"] + 3 * agent["ahead_error"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fit_is_deterministic_and_writes_a_file_that_the_policy_loads(name, tmp_path, capsys):
    files = []
    for again in ("a", "b"):
        out = tmp_path / f"{again}.safetensors"
        arguments = ["--network", name, "--out", str(out), "--iterations", "1", "--batch", "4", "--held-out", "0"]
        assert fit.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["held_out"] == {}
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert Agent(parameters=out).uses == {"influence", "feedback"}
    assert kind_of(load_network(out)) == NETWORKS[name]


def test_the_shipped_network_is_loaded_by_its_kind():
    assert isinstance(load_network(SHIPPED), SetNetwork)
