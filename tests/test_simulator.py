"""The simulator, the rollouts of the agent in it, and the fit."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from mixloader.agent import fit
from mixloader.agent.features import SOURCE, TARGET
from mixloader.agent.network import SetNetwork, load_parameters
from mixloader.agent.policy import SHIPPED, Agent
from mixloader.agent.rollout import by_network, by_parameters, play
from mixloader.agent.simulator import Episodes, Simulator
from mixloader.observation import DomainTable, Observation, Signal


@pytest.fixture(scope="module")
def episodes():
    return Episodes.draw(48, np.random.default_rng(7))


def finished(episodes, weights, steps=32, seed=0):
    simulator = Simulator(episodes, steps, np.random.default_rng(seed))
    for _ in range(steps):
        simulator.step(weights)
    return simulator


def only(episodes, code):
    """All weight on one field, natural inside; the prior where the episode has no such field."""
    inside = torch.where((episodes.field == code) & episodes.mask, episodes.tokens, torch.zeros(()))
    total = inside.sum(1, keepdim=True)
    return torch.where(total > 0, inside / total.clamp_min(1e-9), episodes.prior)


def both_fields(episodes):
    return ((episodes.field == SOURCE).any(1) & (episodes.field == TARGET).any(1)).numpy()


def test_draws_are_mixtures_of_many_sizes_and_reproducible(episodes):
    again = Episodes.draw(48, np.random.default_rng(7))
    for name in (f.name for f in fields(Episodes)):
        assert torch.equal(getattr(episodes, name), getattr(again, name)), name
    sizes = episodes.mask.sum(1)
    assert sizes.min() <= 4
    assert sizes.max() >= 14
    np.testing.assert_allclose(episodes.prior.sum(1), 1, rtol=1e-5)
    assert (episodes.prior[~episodes.mask] == 0).all()


def test_what_is_not_practised_is_forgotten_and_what_is_read_is_learned(episodes):
    both = both_fields(episodes)
    source_on_target, target_on_target = finished(episodes, only(episodes, TARGET)).improvements()
    source_on_source, target_on_source = finished(episodes, only(episodes, SOURCE)).improvements()
    assert (target_on_target > target_on_source)[both].float().mean() > 0.95
    assert (source_on_source > source_on_target)[both].float().mean() > 0.95
    # The ranges that real runs of small models showed: nats of loss, mean over a field.
    assert 0.05 < -source_on_target[both].median() < 2.0
    assert 0.3 < target_on_target[both].median() < 2.5


def test_forgetting_is_undone_by_practice(episodes):
    both = both_fields(episodes)
    forgets = replace(episodes, gain=torch.zeros_like(episodes.gain), lr_end=torch.ones(len(episodes)))
    simulator = Simulator(forgets, 40, np.random.default_rng(0))
    for _ in range(20):
        simulator.step(only(episodes, TARGET))
    middle = simulator.improvements()[0]
    for _ in range(20):
        simulator.step(only(episodes, SOURCE))
    end = simulator.improvements()[0]
    assert (middle < 0)[both].all()
    assert (end > middle)[both].all()


def test_repetition_is_worth_less(episodes):
    scarce = replace(episodes, tokens=episodes.tokens * 1e-3)
    plenty = replace(episodes, tokens=episodes.tokens * 1e3)
    target = only(episodes, TARGET)
    both = both_fields(episodes)
    assert (finished(scarce, target).improvements()[1] < finished(plenty, target).improvements()[1])[
        both
    ].float().mean() > 0.9


def test_the_path_hardly_depends_on_the_number_of_steps(episodes):
    coarse, fine = (finished(episodes, episodes.prior, steps).held_out() for steps in (32, 256))
    assert (coarse - fine).abs().max() < 0.1
    assert (coarse - fine).abs().mean() < 0.01


def test_observed_losses_have_the_noise_of_their_rows(episodes):
    """A domain's observation is NaN without rows, and its error shrinks with the root of the number of rows."""
    steady = replace(episodes, bump=torch.zeros(len(episodes)), tokens=episodes.tokens * 1e3)
    simulator = Simulator(steady, 64, np.random.default_rng(1))
    errors = []
    for _ in range(64):
        expected = simulator.held_out().numpy()
        loss, std, count = simulator.step(steady.prior)
        assert (np.isnan(loss) == (count == 0)).all()
        assert (np.isnan(std) == (count == 0)).all()
        rows = count / (steady.budget / steady.rows).numpy()[:, None]
        errors.append(((loss - expected) * np.sqrt(rows) / steady.row_std.numpy())[count > 0])
    # Standard normal: 1 within 4 standard errors of the variance.
    z = np.concatenate(errors)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / len(z)) + 0.01


def test_rows_add_up_to_the_quota(episodes):
    simulator = Simulator(episodes, 64, np.random.default_rng(1))
    total = sum(simulator.step(episodes.prior)[2] for _ in range(64))
    quota = (episodes.prior * episodes.budget[:, None]).numpy()
    row = (episodes.budget / episodes.rows).numpy()[:, None]
    assert (np.abs(total - quota) <= 1.1 * row + 1e-4 * quota).all()


def test_gradient_of_the_score_is_that_of_finite_differences(episodes):
    few = Episodes(**{f.name: getattr(episodes, f.name)[:4] for f in fields(Episodes)})
    few = Episodes(
        **{f.name: (t.double() if (t := getattr(few, f.name)).is_floating_point() else t) for f in fields(Episodes)}
    )
    weights = few.prior.clone().requires_grad_()
    finished(few, weights, 12).score().sum().backward()
    direction = torch.from_numpy(np.random.default_rng(0).normal(size=weights.shape)) * few.mask * few.prior
    step = 1e-5
    up, down = (finished(few, few.prior + s * direction, 12).score().sum() for s in (step, -step))
    torch.testing.assert_close((weights.grad * direction).sum(), (up - down) / (2 * step), rtol=1e-4, atol=1e-7)


def test_the_policy_and_the_two_rollouts_take_the_same_path():
    """Agent.decide on Observations, its compiled parts in a batch, and the torch network that is fitted."""
    drawn = Episodes.draw(8, np.random.default_rng(3))
    parameters = load_parameters(SHIPPED)
    network = SetNetwork.of(parameters)

    paths = {}
    for name, inner in (("compiled", by_parameters(parameters)), ("torch", by_network(network, []))):
        path = paths.setdefault(name, [])

        def decide(watcher, weights, inner=inner, path=path):
            path.append(inner(watcher, weights).detach())
            return path[-1]

        play(drawn, 24, decide, np.random.default_rng(5))
    # The fallback acts in the first only; these episodes do not need it. Float32 differences are fed back 23 times.
    np.testing.assert_allclose(torch.stack(paths["compiled"]), torch.stack(paths["torch"]), atol=2e-4)

    rng = np.random.default_rng(5)
    simulator = Simulator(drawn, 24, rng)
    known = rng.random(8) > 0.1
    assert known[0]
    size, budget = int(drawn.mask[0].sum()), float(drawn.budget[0])
    kinds = tuple({0: None, SOURCE: "source", TARGET: "target"}[int(code)] for code in drawn.field[0, :size])
    tokens = (drawn.tokens * drawn.budget[:, None]).double().numpy().astype(np.int64)[0, :size]
    agent = Agent(preference=float(drawn.preference[0]))
    agent.reset(
        DomainTable(tuple(map(str, range(size))), kinds, (None,) * size, tokens, drawn.prior[0, :size].double().numpy())
    )
    weights = drawn.prior
    for t in range(23):
        loss, std, count = (a[0, :size] for a in simulator.step(weights))
        seen = (simulator.read[0, :size].double().numpy() * budget).astype(np.int64)
        done = (t + 1) / 24
        observation = Observation(
            step=t, effect_step=t + 1, tokens=round(budget * done), tokens_since=round(budget / 24), progress=done,
            weights=weights[0, :size].double().numpy(), seen=seen, epochs=seen / tokens,
            loss=Signal(loss, count, np.where(count > 0, 0, -1)), loss_std=std,
        )  # fmt: skip
        np.testing.assert_allclose(agent.decide(observation), paths["compiled"][t][0, :size], atol=1e-5)
        weights = paths["compiled"][t]


def test_the_shipped_agent_beats_half_and_half_on_episodes_it_was_not_fitted_on():
    scores = fit.evaluate(load_parameters(SHIPPED), seed=99, count=128, oracles=False)
    agent, half = scores["agent"], scores["half"]
    assert agent["score"] > max(half["score"], scores["natural"]["score"])
    assert agent["ahead_of_half"] > 3 * agent["ahead_error"]


def test_best_fixed_mixture_is_better_than_the_fixed_ones_it_starts_from():
    drawn = Episodes.draw(16, np.random.default_rng(11))
    best = fit.run_fixed(drawn, fit.best_schedule(drawn, 1, steps=12, iterations=30), 12).score()
    half = fit.run_fixed(drawn, fit.half_and_half(drawn), 12).score()
    assert (best >= half - 1e-3).all()
    assert (best - half).mean() > 0.01


def test_fit_is_deterministic_and_writes_a_file_that_the_policy_loads(tmp_path, capsys):
    files = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        assert fit.main(["--out", str(out), "--iterations", "2", "--batch", "4", "--held-out", "0"]) == 0
        assert json.loads(capsys.readouterr().out)["held_out"] == {}
        files.append(out.read_bytes())
    assert files[0] == files[1]
    Agent(parameters=out)
