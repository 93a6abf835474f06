"""Trajectories: from a record, what a policy saw comes back; rewards add up; a file gives back what was written."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from agent_runs import save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import Chase, tiny_config, tiny_data

from mixloader.agent.offline.dataset import of_trajectory
from mixloader.agent.offline.fit import main as fit_agent
from mixloader.agent.policy import SHIPPED
from mixloader.agent.trajectories import Trajectory, read_trajectories, rounded, write_trajectories
from mixloader.agent.transformer import HistoryNetwork
from mixloader.errors import RecordError
from mixloader.observation import Observation, Signal
from mixloader.policies import make_policy, register
from mixloader.train.trainer import train

SEEN: list[Observation] = []


@register("told")
class Told(Chase):
    """Remembers what it was given."""

    needs = frozenset({"loss", "influence"})

    def decide(self, observation):
        SEEN.append(observation)
        weights = super().decide(observation) ** 6  # so uneven that not every domain is read between two decisions
        return weights / weights.sum()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


def run(data, out, **changes):
    """A run, as a trajectory, and the observations of its policy."""
    SEEN.clear()
    options = {"policy": "told", "feedback": True, "eval_every": 3, "decide_every": 2, "steps": 24, "dtype": "float32"}
    options |= {"influence": {"rank": 4, "stride": 5, "probe_every": 7, "probe_rows": 4}, "record_detail": True}
    config = tiny_config(data, out, **{**options, **changes})
    result = train(config, progress=False)
    points = [
        {"tokens": 0, "losses": result.losses_before},
        {"tokens": result.tokens, "losses": result.losses_after},
    ]
    return Trajectory.from_record(result.record, held_out=points), list(SEEN)


@pytest.fixture(scope="module")
def known(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("run"))


def assert_same_signal(found, expected, digits):
    np.testing.assert_allclose(found.value, expected.value, rtol=10.0**-digits)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.age, expected.age)


def assert_same_observation(found, expected, digits=5):
    for key in ("step", "effect_step", "tokens", "tokens_since", "influence_fields"):
        assert getattr(found, key) == getattr(expected, key), key
    assert found.progress == pytest.approx(expected.progress, rel=1e-12, nan_ok=True)
    np.testing.assert_array_equal(found.seen, expected.seen)
    np.testing.assert_allclose(found.epochs, expected.epochs, rtol=1e-12)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=10.0**-digits)
    assert_same_signal(found.loss, expected.loss, digits)
    np.testing.assert_allclose(found.loss_std, expected.loss_std, rtol=10.0**-digits)
    assert found.feedback.keys() == expected.feedback.keys()
    for name, signal in expected.feedback.items():
        assert_same_signal(found.feedback[name], signal, digits)
    assert (found.influence is None) == (expected.influence is None)
    if expected.influence is not None:
        assert_same_signal(found.influence, expected.influence, 2.3)
        np.testing.assert_allclose(found.influence_std, expected.influence_std, rtol=5e-3)


def test_what_the_policy_saw_comes_back(known):
    trajectory, seen = known
    found = list(trajectory.observations())
    assert len(found) == len(seen) == len(trajectory) == 12
    assert any(o.influence is None for o in seen)
    assert any(o.influence is not None and (o.influence.age > 0).any() for o in seen), "old influence is among it"
    assert any((o.loss.age > 0).any() for o in seen), "so are old losses"
    for one, other in zip(found, seen, strict=True):
        assert_same_observation(one, other)


def test_it_comes_back_without_a_budget_feedback_or_influence_too(data, tmp_path):
    trajectory, seen = run(data, tmp_path / "run", policy="told", feedback=False, decide_every=1)
    trajectory = dataclasses.replace(trajectory, token_budget=0)
    for one, other in zip(trajectory.observations(), seen, strict=True):
        assert np.isnan(one.progress)
        assert_same_observation(dataclasses.replace(one, progress=other.progress), other)
        assert one.feedback == {}


def test_answers_are_the_rows_after_the_observations(known):
    trajectory, seen = known
    policy = Told()
    policy.reset(trajectory.table)
    for t, observation in enumerate(seen):
        np.testing.assert_allclose(trajectory.weights[t], observation.weights, rtol=1e-8)
        np.testing.assert_allclose(trajectory.weights[t + 1], policy.decide(observation), rtol=1e-6, atol=1e-9)


def test_the_table_is_the_one_that_the_policy_was_reset_with(data, tmp_path):
    tables = []

    @register("keeps its table")
    class Keeper(Chase):
        def reset(self, domains):
            tables.append(domains)
            super().reset(domains)
            return np.array([0.2, 0.5, 0.3])

    trajectory, _ = run(data, tmp_path / "run", policy="keeps its table", weights={"prose": 1, "code": 2, "maths": 5})
    table = tables[-1]
    assert (trajectory.table.names, trajectory.table.fields) == (table.names, table.fields)
    np.testing.assert_array_equal(trajectory.table.tokens, table.tokens)
    np.testing.assert_allclose(trajectory.table.prior, table.prior, rtol=1e-8)
    np.testing.assert_allclose(trajectory.weights[0], [0.2, 0.5, 0.3], atol=1e-8)


def test_any_record_is_a_trajectory_with_what_it_has(data, tmp_path):
    trajectory, seen = run(data, tmp_path / "run", record_detail=False)
    for one, other in zip(trajectory.observations(), seen, strict=True):
        assert np.isnan(one.loss_std).all()
        assert_same_signal(one.loss, other.loss, 5)
        if one.influence is not None:
            np.testing.assert_allclose(one.influence.value, other.influence.value, rtol=5e-3)
            assert np.isnan(one.influence_std).all()
    assert trajectory.probed.all()
    assert trajectory.preference == 0.5


def test_records_that_are_no_trajectories_are_refused(data, tmp_path):
    trajectory, _ = run(data, tmp_path / "run")
    path = tmp_path / "run" / "record.jsonl"
    header, *lines = path.read_text().splitlines()
    old = {key: value for key, value in json.loads(header).items() if key != "windows"}
    path.write_text("\n".join([json.dumps(old), *lines]) + "\n")
    with pytest.raises(RecordError, match="its header does not say 'windows'"):
        Trajectory.from_record(path)
    path.write_text(header + "\n")
    with pytest.raises(RecordError, match="it has no decision"):
        Trajectory.from_record(path)
    assert len(trajectory) == 12


# Rewards


def test_rewards_add_up_to_the_fall_of_the_balanced_loss(known):
    trajectory, _ = known
    trajectory = dataclasses.replace(trajectory, preference=0.3)
    told = trajectory.feedback
    source, target = (told[:, trajectory.feedback_names.index(name)] for name in ("source", "target"))
    balanced = 0.3 * source + 0.7 * target
    at = (trajectory.feedback_step + 1) * trajectory.tokens_per_step
    first = np.interp(trajectory.effect[0] * trajectory.tokens_per_step, at, balanced)
    rewards = trajectory.rewards()
    assert rewards.shape == (len(trajectory),)
    assert rewards.sum() == pytest.approx(first - balanced[-1], rel=1e-12)
    # A decision after whose effect nothing was trained gets nothing.
    assert rewards[-1] == 0.0
    # Each part is that of its own interval.
    ends = np.append(trajectory.effect, trajectory.steps).clip(max=trajectory.steps) * trajectory.tokens_per_step
    for t in (0, 4, 9):
        fall = np.interp(ends[t], at, balanced) - np.interp(ends[t + 1], at, balanced)
        assert rewards[t] == pytest.approx(fall, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(preference=st.floats(0, 1), shift=st.floats(-1, 1))
def test_what_no_probe_covers_counts_like_any_domain(known, preference, shift):
    trajectory, _ = known
    assert trajectory.table.fields == ("source", "source", "target")
    probed = np.array([True, False, True])
    held_out = trajectory.held_out.copy()
    held_out[-1, 1] += shift  # a source domain that no probe covers any more
    changed = dataclasses.replace(trajectory, probed=probed, held_out=held_out, preference=preference)
    usual = dataclasses.replace(trajectory, probed=probed, preference=preference)
    part = (usual.steps - usual.effect[0]) / usual.steps
    difference = changed.rewards().sum() - usual.rewards().sum()
    assert difference == pytest.approx(-shift * part * preference / 2, abs=1e-9)


def test_without_feedback_the_score_text_stands_in(known):
    trajectory, _ = known
    blind = dataclasses.replace(
        trajectory, feedback_names=(), feedback=trajectory.feedback[:, :0], probed=np.zeros(3, dtype=bool)
    )
    part = (blind.steps - blind.effect[0]) / blind.steps
    assert blind.rewards().sum() == pytest.approx(part * blind.gain(), rel=1e-9)
    with pytest.raises(RecordError, match="neither feedback nor held-out losses"):
        dataclasses.replace(blind, held_out=blind.held_out[:0], held_out_tokens=blind.held_out_tokens[:0]).rewards()


def test_the_gain_counts_every_domain_of_a_field_alike(known):
    trajectory, _ = known
    held_out = np.array([[3.0, 4.0, 6.0], [3.5, 3.0, 4.0]])
    one = dataclasses.replace(trajectory, held_out=held_out, held_out_tokens=np.array([0, 9]), preference=0.25)
    assert one.gain() == pytest.approx(0.25 * (-0.5 + 1.0) / 2 + 0.75 * 2.0)
    assert np.isnan(dataclasses.replace(one, held_out=held_out[:1]).gain())


# Files


def test_a_file_gives_back_what_was_written_to_five_digits(known, data, tmp_path):
    trajectory, seen = known
    other, _ = run(data, tmp_path / "run", feedback=False, influence=None, policy="chase", steps=5, eval_every=0)
    path = tmp_path / "all.zst"
    write_trajectories(path, [trajectory, other])
    found = read_trajectories(path)
    for one, was in zip(found, (trajectory, other), strict=True):
        for key, value in vars(was).items():
            if isinstance(value, np.ndarray):
                assert getattr(one, key).dtype == value.dtype, key
                np.testing.assert_allclose(getattr(one, key), value, rtol=5.1e-5 if key == "weights" else 5e-6 * 10)
            elif key != "table":
                assert getattr(one, key) == value, key
        assert one.table.names == was.table.names
        np.testing.assert_allclose(one.weights.sum(axis=1), 1.0, rtol=1e-12)
    for one, policy_saw in zip(found[0].observations(), seen, strict=True):
        assert_same_observation(one, policy_saw, digits=4)
    again = tmp_path / "again.zst"
    write_trajectories(again, found)
    np.testing.assert_array_equal(read_trajectories(again)[0].loss, found[0].loss)
    write_trajectories(again, [other])  # without a single number of influence
    assert len(read_trajectories(again)[0].influence) == 0


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-30, 1e30), st.booleans())
def test_five_digits_survive_single_precision(value, negative):
    value = -value if negative else value
    once = rounded(np.array([value]))
    assert once[0] == pytest.approx(float(f"{value:.5g}"), rel=1e-12)
    np.testing.assert_array_equal(rounded(once.astype("<f4")), once)


def test_a_file_that_is_damaged_or_something_else_is_refused(known, tmp_path):
    path = tmp_path / "one.zst"
    write_trajectories(path, [known[0]])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no", zstandard.ZstdCompressor().compress(b'{"a": 1}\n')):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"no file of trajectories|damaged"):
            read_trajectories(path)
    with pytest.raises(RecordError, match="cannot read"):
        read_trajectories(Path(tmp_path / "nothing.zst"))


def test_signals_are_the_policys_own(known):
    """What a policy does to an observation does not reach the next one, as in a Mixer."""
    first, *_ = observations = list(known[0].observations())
    first.loss.value[:] = -1.0
    first.weights[:] = 0.0
    again = list(known[0].observations())
    assert again[0].loss.value.min() > 0
    assert isinstance(observations[1].loss, Signal)
    assert observations[1].weights.sum() == pytest.approx(1.0)


def test_a_trajectory_is_decisions_to_learn_from(known):
    trajectory, seen = known
    found = of_trajectory(trajectory)
    kept = trajectory.effect < trajectory.steps
    assert len(found) == kept.sum() < len(trajectory), "the last decision has no effect any more"
    np.testing.assert_allclose(found.action, trajectory.weights[1:][kept], rtol=1e-5)
    np.testing.assert_allclose(found.weights, [o.weights for o in seen][: len(found)], rtol=1e-5)
    np.testing.assert_allclose(found.reward, trajectory.rewards()[kept], rtol=1e-5, atol=1e-7)
    assert found.left.tolist() == list(range(len(found) - 1, -1, -1))
    np.testing.assert_allclose(found.tokens, [o.tokens for o in seen][: len(found)], rtol=1e-6)
    np.testing.assert_allclose(found.tokens / found.budget, [o.progress for o in seen][: len(found)], rtol=1e-6)


@pytest.mark.parametrize("kind", ["set", "transformer"])
def test_an_agent_is_fitted_to_a_file_of_trajectories(known, tmp_path, capsys, kind):
    trajectory, _ = known
    better = dataclasses.replace(
        trajectory, feedback=trajectory.feedback * np.linspace(1, 0.9, len(trajectory.feedback))[:, None]
    )
    write_trajectories(tmp_path / "runs.zst", [trajectory, better])
    start = SHIPPED
    if kind == "transformer":
        start = save_random(tmp_path / "start.safetensors", HistoryNetwork(hidden=8))
    given = ["--start", str(start), "--out", str(tmp_path / "agent.safetensors"), "--updates", "3"]
    assert fit_agent([str(tmp_path / "runs.zst"), *given]) == 0
    assert (tmp_path / "agent.safetensors").read_bytes() != start.read_bytes()
    assert "2 runs" in capsys.readouterr().out
    policy = make_policy("agent", parameters=str(tmp_path / "agent.safetensors"))
    policy.reset(trajectory.table)
    weights = policy.decide(next(trajectory.observations()))
    assert weights is not None
    assert weights.sum() == pytest.approx(1)
