"""What is seen of simulated runs, rollouts of the agent in them, and its fit."""

import json

import numpy as np
import pytest
import torch
from simulated import draw

from mixloader.agent import fit
from mixloader.agent.action import soft_step
from mixloader.agent.episodes import mask, take
from mixloader.agent.features import SOURCE, TARGET
from mixloader.agent.network import SetNetwork, save_parameters
from mixloader.agent.networks import load_network
from mixloader.agent.policy import SHIPPED, Agent
from mixloader.agent.rollout import back_to_actions, by_parameters, by_random_walk, play
from mixloader.agent.signals import BOTH, DOMAINS, FIELDS, draw_signals, new_readings, read, without
from mixloader.agent.simulator import influence_now, new_history, pull_back, run, score, step
from mixloader.observation import DomainTable, Observation, Signal


@pytest.fixture(scope="module")
def episodes():
    return draw(64, np.random.default_rng(7))


def watched(episodes, steps=48, seed=0, signals=None, **changes):
    """(Readings, History, t) after each step on the prior."""
    rng = np.random.default_rng(seed)
    signals = (signals or draw_signals(episodes, steps, rng))._replace(**changes)
    weights = np.ascontiguousarray(np.repeat(episodes.prior[:, None], steps, 1))
    history, readings = new_history(episodes, steps), new_readings(episodes, rng)
    for t in range(steps):
        step(episodes, weights, history, t)
        read(episodes, signals, history, weights, t, rng, readings)
        yield readings, history, t


def test_observed_losses_have_the_noise_of_their_rows(episodes):
    """A domain's observation is NaN without rows, and its error shrinks with the root of the number of rows."""
    steady = episodes._replace(bump=np.zeros(64), tokens=episodes.tokens * 1e3)
    errors = []
    for seen, history, t in watched(steady, 64):
        expected = (history.held_out[:, t] + history.held_out[:, t + 1]) / 2
        read_any = (seen.tokens > 0) & mask(steady)
        assert (np.isnan(seen.loss) == (seen.tokens == 0))[mask(steady)].all()
        assert (np.isnan(seen.loss_std) == (seen.tokens == 0))[mask(steady)].all()
        rows = seen.tokens / (steady.budget / steady.rows)[:, None]
        errors.append(((seen.loss - expected) * np.sqrt(rows) / np.maximum(steady.row_std, 1e-9))[read_any])
    # Standard normal: 1 within 4 standard errors of the variance.
    z = np.concatenate(errors)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / len(z)) + 0.01


def test_what_is_repeated_is_trained_to_lower_losses_than_what_is_held_out(episodes):
    scarce = episodes._replace(tokens=episodes.tokens * 1e-2, memory=np.full(64, 0.5))
    *_, (seen, history, t) = watched(scarce, 64)
    gap = history.held_out[:, t + 1] - seen.loss
    epochs = history.read[:, -1] / np.maximum(scarce.tokens, 1e-9)
    repeated = mask(scarce) & (seen.tokens > 0) & (epochs > 4)
    assert repeated.sum() > 20
    assert np.median(gap[repeated]) > 0.4
    assert np.median((gap / 0.5 / np.log(np.maximum(epochs, 1.1)))[repeated & (gap < 2)]) == pytest.approx(1, abs=0.3)


def test_rows_add_up_to_the_quota(episodes):
    total = sum(seen.tokens.copy() for seen, _, _ in watched(episodes, 64))
    quota = episodes.prior * episodes.budget[:, None]
    row = (episodes.budget / episodes.rows)[:, None]
    assert (np.abs(total - quota) <= 1.1 * row + 1e-4 * quota).all()


def test_influence_comes_when_due_with_the_error_that_it_reports(episodes):
    """Without memory and distortion: the reported standard error is that of the value, one unit for both fields."""
    every = np.full(64, 4)
    exact = {"influence_kept": np.zeros(64), "distortion": np.ones((*episodes.field.shape, 2))}
    z = []
    for seen, history, t in watched(episodes, 32, influence_every=every, influence_error=np.full(64, 0.3), **exact):
        due = (t + 1) // 4 * 4
        if due == 0:
            assert np.isnan(seen.influence).all()
            assert np.isnan(seen.influence_age).all()
            continue
        youngest = np.nanmin(seen.influence_age, axis=(1, 2))
        np.testing.assert_allclose(youngest, episodes.budget * (t + 1 - due) / 32, atol=1e-6 * episodes.budget.max())
        if due != t + 1:
            continue
        for b in range(64):
            true = np.empty((episodes.size[b], 2))
            influence_now(episodes, b, history, t + 1, true)
            value, std = seen.influence[b, : episodes.size[b]], seen.influence_std[b, : episodes.size[b]]
            unit = UNITS[b] / seen.unit[b]
            z.append(((value - unit * true) / std)[np.isfinite(value)])
            for f, code in enumerate((SOURCE, TARGET)):
                if not (episodes.field[b] == code).any():
                    assert np.isnan(value[:, f]).all()
    z = np.concatenate(z)
    assert len(z) > 3000
    assert abs(np.median(np.abs(z)) - 0.674) < 0.05


UNITS = draw_signals(draw(64, np.random.default_rng(7)), 32, np.random.default_rng(0)).influence_unit


def test_feedback_is_of_probed_domains_on_its_cadence(episodes):
    told = np.resize([FIELDS, DOMAINS, BOTH], 64)
    changes = {"feedback_every": np.full(64, 3), "told": told, "feedback_error": np.zeros(64)}
    for seen, history, t in watched(episodes, 12, offset=np.zeros(episodes.field.shape), **changes):
        for b in range(64):
            n = episodes.size[b]
            losses, probe = history.held_out[b, t, :n], episodes.probe[b, :n]
            by_domain, by_field = seen.feedback[b, :n], seen.feedback[b, n : n + 2]
            if t % 3:
                assert np.isnan(seen.feedback[b, : n + 2]).all()
                continue
            expected = np.where((probe > 0) & (told[b] != FIELDS), losses, np.nan)
            np.testing.assert_array_equal(by_domain, expected)
            for f, code in enumerate((SOURCE, TARGET)):
                has = (episodes.field[b] == code).any() and told[b] != DOMAINS
                mean = (probe * losses)[episodes.field[b, :n] == code].sum() if has else np.nan
                np.testing.assert_allclose(by_field[f], mean)


def test_some_runs_lack_a_signal(episodes):
    many = draw(400, np.random.default_rng(1))
    signals = draw_signals(many, 48, np.random.default_rng(2))
    for every in (signals.influence_every, signals.feedback_every):
        assert 0.15 < (every == 0).mean() < 0.35
        assert {1, 2, 4} <= set(every.tolist())
    bare = without(signals, influence=True, feedback=True)
    for seen, _, _ in watched(many, 6, signals=bare):
        assert np.isnan(seen.influence).all()
        assert np.isnan(seen.feedback).all()


def test_rollouts_are_reproducible_and_stay_on_the_simplex(episodes):
    paths = []
    for _ in range(2):
        rng = np.random.default_rng(5)
        signals = draw_signals(episodes, 20, rng)
        paths.append(play(episodes, signals, 20, by_random_walk(rng), rng))
    for name in ("weights", "domain", "run", "actions", "limit"):
        np.testing.assert_array_equal(getattr(paths[0], name), getattr(paths[1], name))
    weights = paths[0].weights
    np.testing.assert_allclose(weights.sum(-1), 1)
    assert (np.diff(weights, axis=1) != 0).any()
    np.testing.assert_array_equal(run(episodes, weights).held_out, paths[0].history.held_out)


@pytest.fixture(scope="module")
def network():
    """One that reads all features and moves."""
    torch.manual_seed(0)
    network = SetNetwork()
    with torch.no_grad():
        network.head_weight.mul_(20)
    fit.measure_features(network, np.random.default_rng(0), episodes=16)
    return network


def test_the_policy_takes_the_path_of_the_rollout(tmp_path, network):
    """Agent.decide on Observations with all signals, and its compiled parts in a batch, fallback included."""
    parameters, path, steps = network.parameters_as_arrays(), tmp_path / "agent.safetensors", 24
    save_parameters(parameters, path)
    drawn = draw(24, np.random.default_rng(3))
    signals = draw_signals(drawn, steps, np.random.default_rng(4))
    signals.budget_known[:] = True
    rollout = play(drawn, signals, steps, by_parameters(parameters), np.random.default_rng(5), parameters)
    moves = np.abs(np.diff(np.log(np.maximum(rollout.weights, 1e-9)), axis=1))
    assert moves.mean(1)[mask(drawn)].mean() > 0.02

    agents = [followed(drawn, signals, b, path) for b in range(24)]
    rng = np.random.default_rng(5)
    readings, history = new_readings(drawn, rng), new_history(drawn, steps)
    for t in range(steps - 1):
        step(drawn, rollout.weights, history, t)
        read(drawn, signals, history, rollout.weights, t, rng, readings)
        for b, (agent, table) in enumerate(agents):
            seen = history.read[b, (t + 1) * (history.read.shape[1] // steps), : len(table)]
            told = observation_of(drawn, readings, table, rollout.weights, seen, b, t)
            np.testing.assert_allclose(agent.decide(told), rollout.weights[b, t + 1, : len(table)], rtol=2e-3)


def followed(drawn, signals, b, path):
    """The Agent and the DomainTable of episode b."""
    size = int(drawn.size[b])
    kinds = tuple({0: None, SOURCE: "source", TARGET: "target"}[int(code)] for code in drawn.field[b, :size])
    tokens = (drawn.tokens[b, :size] * drawn.budget[b]).astype(np.int64)
    table = DomainTable(tuple(map(str, range(size))), kinds, (None,) * size, tokens, drawn.prior[b, :size])
    model_size = None if np.isnan(signals.log_size[b]) else 10 ** float(signals.log_size[b])
    agent = Agent(preference=float(drawn.preference[b]), parameters=path, model_size=model_size)
    agent.reset(table)
    return agent, table


def observation_of(drawn, readings, table, weights, seen, b, t):
    n, steps, budget = len(table), weights.shape[1], float(drawn.budget[b])
    done, count = (t + 1) / steps, readings.tokens[b, :n]
    age = readings.influence_age[b, :n] / (budget / steps)
    influence = Signal(
        readings.influence[b, :n], np.full((n, 2), 10**9), np.where(np.isnan(age), -1, np.rint(age)).astype(int)
    )
    told = dict(zip((*table.names, "source", "target"), readings.feedback[b, : n + 2], strict=True))
    seen = (seen * budget).astype(np.int64)
    return Observation(
        step=t, effect_step=t + 1, tokens=round(budget * done), tokens_since=round(budget / steps), progress=done,
        weights=weights[b, t, :n], seen=seen, epochs=seen / np.maximum(table.tokens, 1),
        loss=Signal(readings.loss[b, :n], count, np.where(count > 0, 0, -1)), loss_std=readings.loss_std[b, :n],
        feedback={k: Signal(np.array(v), np.array(1), np.array(0)) for k, v in told.items() if np.isfinite(v)},
        influence=influence, influence_std=readings.influence_std[b, :n], influence_fields=("source", "target"),
    )  # fmt: skip


def test_derivatives_reach_the_actions(episodes):
    """Against autograd through the differentiable step, floor and cap passed straight through."""
    rng = np.random.default_rng(5)
    few = take(episodes, slice(0, 16))
    rollout = play(few, draw_signals(few, 12, rng), 12, by_random_walk(rng), rng)
    cotangent = rng.normal(size=rollout.weights.shape) * mask(few)[:, None]
    found = back_to_actions(rollout, cotangent)
    there = torch.from_numpy(mask(few))
    actions = torch.from_numpy(rollout.actions.astype(np.float64)).requires_grad_()
    weights, path = torch.from_numpy(few.prior), []
    for t in range(12):
        path.append(weights)
        moved = soft_step(actions[:, t], weights, torch.from_numpy(rollout.limit[:, t, None]), there)
        if t < 11:
            weights = moved + (torch.from_numpy(rollout.weights[:, t + 1]) - moved).detach()
    (torch.stack(path, 1) * torch.from_numpy(cotangent)).sum().backward()
    np.testing.assert_allclose(found, actions.grad, rtol=1e-9, atol=1e-12)


def test_the_networks_gradient_raises_the_objective(episodes, network):
    """A small step of the weights along it, with the features held as they were, gains what it promises."""
    rng = np.random.default_rng(5)
    signals = draw_signals(episodes, 24, rng)
    rollout = play(episodes, signals, 24, by_parameters(network.parameters_as_arrays()), rng)
    gradient = np.concatenate([grad.ravel() for grad in fit.policy_gradient(network, rollout, rng)])
    assert np.isfinite(gradient).all()
    assert (gradient != 0).mean() > 0.5

    when = np.full(25, fit.UNDERWAY / 24)
    when[0], when[-1] = 0, fit.UNDERWAY / 24 + 1 - fit.UNDERWAY
    before = (score(episodes, rollout.history.held_out) * when).sum(1).mean()
    by_weights = pull_back(episodes, rollout.weights, rollout.history, fit.objective_cotangent(episodes, 24))
    tiny = 1e-6
    nudged = rollout.weights + tiny * by_weights
    after = (score(episodes, run(episodes, nudged).held_out) * when).sum(1).mean()
    np.testing.assert_allclose((after - before) / tiny, (by_weights**2).sum(), rtol=1e-3)


# The fit.


def test_the_shipped_agent_beats_half_and_half_on_episodes_it_was_not_fitted_on():
    scores = fit.evaluate(load_network(SHIPPED), seed=99, count=256, oracles=False)
    agent, half = scores["agent"], scores["half"]
    assert agent["score"] > max(half["score"], scores["natural"]["score"])
    assert agent["ahead_of_half"] > 3 * agent["ahead_error"]


def test_best_fixed_mixture_is_better_than_the_fixed_ones_it_starts_from():
    drawn = draw(16, np.random.default_rng(11))
    mixtures = {parts: fit.best_schedule(drawn, parts, steps=12, iterations=60) for parts in (1, 4)}
    best, schedule = (score(drawn, fit.run_fixed(drawn, w, 12)[:, -1]) for w in mixtures.values())
    half = score(drawn, fit.run_fixed(drawn, fit.half_and_half(drawn), 12)[:, -1])
    assert (best >= half - 1e-3).all()
    assert (best - half).mean() > 0.01
    assert schedule.mean() > best.mean()


def test_a_short_fit_improves_the_score():
    fitted = fit.fit(seed=0, iterations=25, batch=64)
    scores = fit.evaluate(fitted, seed=5, count=256, oracles=False)
    agent, prior = scores["agent"], scores["prior"]
    assert agent["score"] > prior["score"] + 3 * agent["ahead_error"]


def test_the_speed_of_the_simulator_is_measured(tmp_path, monkeypatch, capsys):
    bench = pytest.importorskip("bench.simulator")
    monkeypatch.setattr(bench, "EPISODES", 4)
    bench.main(["--rounds", "1", "--json", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["measure"] for row in rows][-1] == "fit"
    assert all(row["steps_per_s"]["median"] > 0 for row in rows)
    assert "steps/s" in capsys.readouterr().out
