"""The simulator fitted to runs: made by the simulator itself, so that what there is to find is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated import BUDGET, NOISE, PLAN_STEPS, RANGES, SEQ_LEN, draw, made_runs

from mixloader.agent import episodes as drawing
from mixloader.agent.calibrate import calibrate, fitted_ranges, influence_agreement, main, predictions, some
from mixloader.agent.episodes import Ranges, mask, read_ranges, take
from mixloader.agent.identify import OF_RUN, identify
from mixloader.agent.measured import ERROR, measured_runs
from mixloader.agent.simulator import run
from mixloader.agent.trajectories import write_trajectories
from mixloader.agent.trajectory import Trajectory
from mixloader.agent.twins import draw_twins, twins_of
from mixloader.errors import ConfigError

RUNS = 24


@pytest.fixture(scope="module")
def made():
    trajectories, episodes = made_runs(RUNS, 0)
    return measured_runs(trajectories), episodes


@pytest.fixture(scope="module")
def found(made):
    return identify(made[0], RANGES, iterations=200)


def test_what_is_known_of_a_run_is_read_from_its_trajectory(made):
    runs, episodes = made
    for name in ("size", "field", "preference", "probe", "value", "warmup", "lr_end", "budget"):
        np.testing.assert_allclose(getattr(runs.episodes, name), getattr(episodes, name), err_msg=name)
    there = mask(episodes)
    np.testing.assert_allclose(runs.episodes.tokens[there], episodes.tokens[there], atol=SEQ_LEN / BUDGET)
    # Every measurement is that of the path, but for its noise (that of a change has twice the noise).
    losses, usable = run(episodes, runs.weights).held_out, np.isfinite(runs.error)
    there = np.stack([losses[b][runs.when[b].astype(int)] for b in range(RUNS)])
    expected = (runs.of * (there - runs.relative[..., None] * losses[:, :1])).sum(-1)
    apart = (runs.value - expected)[usable]
    assert abs(apart[runs.by_domain[usable]].std() - NOISE) < 0.1 * NOISE
    assert abs(apart.std() - 1.4 * NOISE) < 0.2 * NOISE
    assert (runs.error[usable] >= ERROR).all()
    assert runs.by_domain.sum() == 5 * episodes.size.sum()


def test_mixtures_are_averaged_over_the_tokens_in_which_they_were_in_force():
    (one,), episodes = made_runs(1, 3)
    late = np.where(one.effect < 100, one.effect, PLAN_STEPS)  # the last decisions never take effect
    delayed = Trajectory(**{**one.__dict__, "effect": late})
    weights = measured_runs([delayed]).weights[0, :, : episodes.size[0]]
    np.testing.assert_allclose(weights[:49], one.weights[:49], atol=1e-12)
    np.testing.assert_allclose(weights[49:], np.broadcast_to(one.weights[49], (15, episodes.size[0])), atol=1e-12)

    uneven = Trajectory(**{**one.__dict__, "effect": one.effect + (one.effect < 100)})
    weights = measured_runs([uneven]).weights[0, :, : episodes.size[0]]
    np.testing.assert_allclose(weights[1], (one.weights[0] + one.weights[1]) / 2, atol=1e-12)
    np.testing.assert_allclose(weights.sum(-1), 1)


def test_runs_without_held_out_losses_are_refused():
    (one,), _ = made_runs(1, 3)
    with pytest.raises(ConfigError, match="trajectory 0 has 1 held-out losses"):
        measured_runs([Trajectory(**{**one.__dict__, "held_out": one.held_out[:1]})])


@pytest.mark.slow
def test_the_numbers_of_the_runs_are_found(made, found):
    """As far as five losses a domain and their fields' feedback tell; the logarithms of what was drawn."""
    runs, episodes = made
    apart = (found.predicted - runs.value)[np.isfinite(runs.error)]
    assert np.sqrt(np.mean(apart**2)) < 3 * NOISE
    # Where domains are many, little is known of each.
    there = mask(episodes) & (episodes.level[..., 0] > 0) & (episodes.size < 20)[:, None]
    for name, least in (("level", 0.8), ("rate", 0.55), ("hold", 0.3), ("gain", 0.5)):
        true, value = (np.log(getattr(e, name)[there]) for e in (episodes, found.episodes))
        true, value = (x if x.ndim == 1 else x[:, 0] for x in (true, value))
        assert np.corrcoef(true, value)[0, 1] > least, name


def test_a_prediction_has_the_derivative_that_the_fit_uses(made):
    """The gradient that Adam follows, of a run's rates, against finite differences of its predictions."""
    from mixloader.agent.identify import _FITTED, _Measured

    runs, _ = made
    truth = identify(runs, RANGES, iterations=1).episodes
    numbers = [torch.from_numpy(np.array(getattr(truth, name))) for name in _FITTED]
    rng = np.random.default_rng(0)
    direction = [torch.from_numpy(rng.standard_normal(tuple(n.shape))) * n for n in numbers]
    weight = torch.from_numpy(rng.standard_normal(runs.value.shape))

    def at(step):
        return (_Measured.apply(runs, *(n + step * d for n, d in zip(numbers, direction, strict=True))) * weight).sum()

    leaves = [n.clone().requires_grad_() for n in numbers]
    (_Measured.apply(runs, *leaves) * weight).sum().backward()
    found = sum((leaf.grad * d).sum() for leaf, d in zip(leaves, direction, strict=True))
    torch.testing.assert_close(found, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_second_half_of_a_run_is_predicted_from_the_first(made):
    runs = some(made[0], np.arange(12))
    report = predictions(runs, RANGES, RANGES, iterations=200)
    assert report["calibrated"] == report["before"]
    for simple in ("power_law", "last", "before_blind", "first"):
        assert report["before"]["all"] < 0.75 * report[simple]["all"], simple


def test_what_nothing_was_measured_of_keeps_its_range(made):
    runs, _ = made
    nothing = runs._replace(error=np.full_like(runs.error, np.inf))
    ranges = RANGES
    rng = np.random.default_rng(0)
    values = identify(nothing, ranges, sample=rng, iterations=20).values
    for name in OF_RUN:
        low, high = getattr(ranges, name)
        low = max(low, 0.02 * high)
        z = (np.log(values[name]) - np.log(low)) / np.log(high / low) * 2 - 1
        assert abs(z.mean()) < 0.35, name
        assert 0.3 < z.std() < 0.75, name


@pytest.mark.slow
def test_ranges_follow_the_runs(made):
    """Runs whose levels nearly all lie above the range that was likely before, or in its upper half."""
    runs, _ = made
    before = RANGES._replace(source_level=(0.02, 0.4), start=(1.0, 9.0))
    after = fitted_ranges(runs, before, np.random.default_rng(0), iterations=150)
    assert isinstance(after, Ranges)
    assert after.source_level[1] > 1.3 * before.source_level[1]
    assert after.source_level[0] > 2 * before.source_level[0]
    assert after.start[0] > 1.4
    assert after.start[1] < 4.6
    assert after.bump == before.bump


def test_influence_is_told_from_losses_alone(made):
    trajectories, _ = made_runs(RUNS, 0)
    assert influence_agreement(trajectories, made[0], RANGES, iterations=150) > 0.8
    mute = [Trajectory(**{**one.__dict__, "influence_fields": ()}) for one in trajectories[:2]]
    assert np.isnan(influence_agreement(mute, some(made[0], np.arange(2)), RANGES, iterations=1))


@pytest.mark.slow
def test_the_command_writes_ranges_and_reports(tmp_path, capsys):
    files = tmp_path / "runs.zst", tmp_path / "a.json", tmp_path / "b.json"
    write_trajectories(files[0], made_runs(6, 1)[0])
    for out in files[1:]:
        assert main([str(files[0]), "--out", str(out), "--iterations", "5"]) == 0
    report = json.loads(capsys.readouterr().out.split("}\n{")[0] + "}")["unseen"]
    assert report["runs"] == 1
    assert {"calibrated", "before", "power_law", "last"} <= set(report)
    assert files[1].read_bytes() == files[2].read_bytes()
    assert read_ranges(files[1]) != RANGES
    drawing.draw(16, np.random.default_rng(0), read_ranges(files[1]))
    with pytest.raises(ConfigError, match="4 runs are too few"):
        calibrate(measured_runs(made_runs(4, 1)[0]), RANGES)


def test_runs_of_one_episode_have_the_same_numbers_and_one_twin():
    drawn = take(draw(2, np.random.default_rng(4)), np.array([0, 0, 0, 1]))
    trajectories, _ = made_runs(4, 4, drawn)
    numbered = [replace(one, meta=one.meta | {"number": n}) for one, n in zip(trajectories, (7, 7, 7, 9), strict=True)]
    assert measured_runs(trajectories).episode.tolist() == [0, 1, 2, 3]
    runs = measured_runs(numbered)
    assert runs.episode.tolist() == [0, 0, 0, 1]
    assert runs.first.tolist() == [0, 3]
    found = identify(runs, RANGES, iterations=40)
    for name in ("gain", "level", "transfer", "wear"):
        array = getattr(found.episodes, name)
        np.testing.assert_array_equal(array[0], array[1])
        assert not np.array_equal(array[0], array[3])
    assert len(twins_of(runs, RANGES, np.random.default_rng(0), copies=2).size) == 4
    # One that differs in its domains is another episode, whatever its number.
    assert measured_runs([numbered[0], replace(numbered[3], meta=numbered[0].meta)]).episode.tolist() == [0, 1]


@pytest.mark.slow
def test_twins_answer_as_the_runs_and_are_asked_something_else(made):
    runs, episodes = made
    some_runs = some(runs, np.arange(8))
    twins = twins_of(some_runs, RANGES, np.random.default_rng(0), copies=2)
    again = twins_of(some_runs, RANGES, np.random.default_rng(0), copies=2)
    assert all(np.array_equal(a, b) for a, b in zip(twins, again, strict=True))
    both = np.concatenate([some_runs.weights, some_runs.weights])
    wanted = run(take(episodes, np.arange(8)), some_runs.weights[..., : episodes.field.shape[1]]).held_out
    apart = run(twins, both).held_out - np.concatenate([wanted, wanted])
    assert np.sqrt(np.mean(apart[np.broadcast_to(mask(twins)[:, None], apart.shape)] ** 2)) < 0.1
    before = [array.copy() for array in twins]
    drawn = draw_twins(twins, 200, np.random.default_rng(1), RANGES)
    assert all(np.array_equal(a, b) for a, b in zip(twins, before, strict=True))
    assert len(np.unique(drawn.preference)) > 80
    assert set(np.round(drawn.rate[:, 0, 0], 12)) == set(np.round(twins.rate[:, 0, 0], 12))
    np.testing.assert_allclose(drawn.prior.sum(1), 1)
    np.testing.assert_allclose((drawn.value * mask(drawn)).sum(1), drawn.value.sum(1))
