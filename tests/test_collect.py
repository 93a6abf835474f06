"""`python -m mixloader collect`: episodes run, are gone on with after a stop, and are packed with a card."""

import json

import numpy as np
import pytest
import torch
import yaml
from collecting import Here, tiny_split, write_corpora
from tiny_run import tiny_config, tiny_data

from mixloader.agent import behaviours
from mixloader.agent import collect as collecting
from mixloader.agent.collect import collect, main
from mixloader.agent.collection import Collection
from mixloader.agent.corpora import open_fold
from mixloader.agent.episode import base_cell, draw_episode, episode_cell
from mixloader.agent.trajectories import Trajectory, read_trajectories
from mixloader.compare.cell import run_cell
from mixloader.errors import ConfigError, StateError
from mixloader.formats import read_tokens
from mixloader.mixer import Mixer
from mixloader.observation import DomainTable, Observation, Signal
from mixloader.policies import make_policy
from mixloader.record import read_record
from mixloader.train.trainer import train

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(autouse=True, scope="module")
def in_process():
    threads, usual = torch.get_num_threads(), collecting.make_workers
    collecting.make_workers = Here
    yield
    collecting.make_workers = usual
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(corpora, tmp_path_factory):
    """A collection with four episodes."""
    out = tmp_path_factory.mktemp("collection")
    assert collect(tiny_split(), corpora, out, range(4), show=False) == []
    return Collection(tiny_split(), out)


def decided(path):
    record = read_record(path)
    return record.header | {"created": ""}, record.decisions, record.events


# What is run


def test_an_episode_leaves_a_record_and_a_score_and_nothing_large(finished):
    assert finished.finished() == [0, 1, 2, 3]
    for number in finished.finished():
        folder = finished.folder(number)
        assert sorted(path.name for path in folder.iterdir()) == [
            "cell.json", "cost.json", "episode.json", "record.jsonl", "result.json",
        ]  # fmt: skip
        trajectory = Trajectory.from_episode(folder)
        episode = draw_episode(tiny_split(), number)
        assert trajectory.table.names == tuple(episode.fields)
        assert trajectory.meta["behaviour"] == episode.behaviour.label
        assert trajectory.preference == episode.preference
        assert trajectory.meta["policy_errors"] == 0
        assert 41 > len(trajectory.feedback) == episode.schedule["steps"] // episode.schedule["eval_every"] + 1
        assert np.isfinite(trajectory.held_out).all()
        assert trajectory.held_out.shape == (5, len(episode.domains)), "before, three times on the way, and at the end"
        assert trajectory.held_out_tokens[[0, -1]].tolist() == [0, trajectory.steps * trajectory.tokens_per_step]
        assert np.isfinite(trajectory.loss_std[trajectory.loss_tokens > 0]).all()
        assert len(trajectory.influence) > 0
        probed = {domain.name for domain in episode.domains if domain.probed}
        assert set(trajectory.feedback_names) - {"source", "target"} == probed
        assert {
            name for name, is_probed in zip(trajectory.table.names, trajectory.probed, strict=True) if is_probed
        } == probed
        assert np.isfinite(trajectory.rewards()).all()


def test_what_is_there_is_not_run_again(finished, corpora, capsys):
    before = {n: (finished.folder(n) / "record.jsonl").stat().st_mtime_ns for n in finished.finished()}
    assert collect(tiny_split(), corpora, finished.out, range(4)) == []
    assert {n: (finished.folder(n) / "record.jsonl").stat().st_mtime_ns for n in finished.finished()} == before
    assert capsys.readouterr().out == ""


def test_a_collection_is_of_one_split(finished, corpora):
    with pytest.raises(StateError, match="episodes of another split"):
        collect(tiny_split(seed=6), corpora, finished.out, range(1))


@pytest.mark.parametrize("number", [0, 3])
def test_an_episode_that_was_stopped_ends_as_the_one_that_was_not(finished, corpora, tmp_path, monkeypatch, number):
    """Its policy, its statistics and its evaluations go on from a checkpoint, whatever the behaviour."""
    step, steps = Mixer.step, draw_episode(tiny_split(), number).schedule["steps"]

    def stop(self):
        step(self)
        if self.token_budget > 500 and self.loader.step == steps * 2 // 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Mixer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_split(), corpora, tmp_path, [number], show=False)
    monkeypatch.undo()
    monkeypatch.setattr(collecting, "make_workers", Here)
    assert list((tmp_path / "episodes" / f"{number:04d}").glob("step-*")), "there is a checkpoint to go on from"
    assert collect(tiny_split(), corpora, tmp_path, [number], show=False) == []
    mine, usual = (out / "episodes" / f"{number:04d}" for out in (tmp_path, finished.out))
    assert decided(mine / "record.jsonl") == decided(usual / "record.jsonl")
    assert json.loads((mine / "cell.json").read_text()) == json.loads((usual / "cell.json").read_text())


def test_a_run_that_fails_is_told_and_tried_again(corpora, tmp_path, monkeypatch, capsys):
    def fail(cell):
        if "episode 1" in cell.title:
            raise ConfigError("no luck")
        return run_cell(cell)

    monkeypatch.setattr(collecting, "run_cell", fail)
    assert collect(tiny_split(), corpora, tmp_path, range(2)) == ["episode 1: no luck"]
    printed = capsys.readouterr()
    assert "episodes: 2 of 2, episode 1 failed, 0:00:00 left" in printed.out
    assert "failed: episode 1: no luck" in printed.err
    monkeypatch.setattr(collecting, "run_cell", run_cell)
    assert collect(tiny_split(), corpora, tmp_path, range(2)) == []
    assert "episodes: 2 of 2, episode 1 " in capsys.readouterr().out


# The text


def test_no_document_is_read_and_asked_for(corpora, finished):
    """Documents carry a number of their own; training, feedback and score share none."""
    from mixloader.documents import load_tokenizer

    data = open_fold(tiny_split(), "only", 300, corpora, finished.out / "data")
    tokenizer = load_tokenizer(finished.out / "data" / "only-300" / "tokenizer.json")

    def numbers(shards):
        text = "".join(tokenizer.decode(read_tokens(shard, 0, shard.tokens).tolist()) for shard in shards)
        return set(text.split("#")[1::2])

    for domain, scored in zip(data.training.domains, data.scored.domains, strict=True):
        read, told, kept = (numbers(shards) for shards in (domain.shards, domain.validation, scored.validation))
        assert read
        assert told
        assert kept
        assert not read & told
        assert not read & kept
        assert not told & kept


def test_held_out_windows_are_as_many_as_the_split_says(corpora, tmp_path):
    split = tiny_split()
    data = open_fold(split, "only", 300, corpora, tmp_path / "data")
    base = base_cell(split, "only", "tiny", "natural", data, tmp_path)
    for number in range(8):
        episode = draw_episode(split, number)
        cell = episode_cell(split, episode, data, base, tmp_path)
        manifest = json.loads((cell.out / "training.json").read_text())
        for field in ("source", "target"):
            told = [d["validation"] for d in manifest["domains"] if d.get("field") == field and d.get("validation")]
            windows = sum((shard["tokens"] - 1) // 16 for shards in told for shard in shards)
            assert windows == pytest.approx(256 / 16, abs=4 * len(told)), "in whole shards of 4"


def test_a_corpus_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no tales.jsonl or tales.jsonl.gz, which the split names"):
        collect(tiny_split(), tmp_path, tmp_path / "out", range(1), show=False)


# The command


def test_the_command_runs_packs_and_describes(corpora, finished, tmp_path, capsys):
    path = tmp_path / "split.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(vars(tiny_split()), default=vars))))
    file = tmp_path / "all.zst"
    arguments = [
        str(path),
        "--out",
        str(finished.out),
        "--corpora",
        str(corpora),
        "--episodes",
        "0:3",
        "--pack",
        str(file),
    ]
    assert main(arguments) == 0
    assert f"trajectories {file}" in capsys.readouterr().out
    trajectories = read_trajectories(file)
    assert [t.meta["number"] for t in trajectories] == [0, 1, 2, 3]
    assert {t.meta["model_size"] for t in trajectories} == {300 * 16 + 16 * 16 + 12 * 16 * 16 + 3 * 16}
    card = (tmp_path / "DATA.md").read_text()
    assert "- 4 trajectories, " in card
    assert "| sums | made up |" in card
    assert f"digest `{tiny_split().digest}`" in card
    for trajectory in trajectories:
        assert f"| {trajectory.meta['behaviour']} | " in card


def test_what_is_asked_of_the_command_is_checked(tmp_path):
    with pytest.raises(ConfigError, match="expected --corpora DIR"):
        main(["--out", str(tmp_path)])
    for text in ("3", "5:2", "0:999", "a:b"):
        with pytest.raises(ConfigError, match="expected A:B with 0 <= A < B <= 384"):
            main(["--out", str(tmp_path), "--corpora", "nowhere", "--episodes", text])
    with pytest.raises(StateError, match="has no finished episode to pack"):
        main(["--out", str(tmp_path / "empty"), "--pack", str(tmp_path / "x.zst")])


# Behaviours


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("label", sorted({label for label, _, _ in behaviours.POLICIES}))
def test_the_policies_that_behaviours_are_made_of_work_in_a_short_run(data, tmp_path, label):
    policy, options = next((policy, options) for name, policy, options in behaviours.POLICIES if name == label)
    changes = {"policy": "perturbed", "steps": 16, "eval_every": 8}
    changes |= {"policy_options": {"inner": policy, "inner_options": options, "noise": 0.3, "seed": 1}}
    config = tiny_config(data, tmp_path / "run", influence={"rank": 4, "stride": 2, "probe_every": 3}, **changes)
    record = read_record(train(config, progress=False).record)
    assert [event for event in record.events if event["event"] == "policy_error"] == []
    assert len(record.decisions) == 16


def see(step, weights, progress):
    size = len(weights)
    loss = Signal(np.full(size, 2.0), np.full(size, 8), np.zeros(size, dtype=np.int64))
    zeros = np.zeros(size)
    return Observation(step, step + 1, (step + 1) * 64, 64, progress, weights, zeros.astype(int), zeros, loss, zeros)


TABLE = DomainTable(
    ("a", "b", "c", "d"), ("source", "source", "target", None), (None,) * 4, np.array([9, 9, 9, 9]), np.full(4, 0.25)
)


def test_a_walk_wanders_and_comes_back_and_goes_on_from_its_state():
    policy = make_policy("walk", temperature=0.5, target_share=0.6, noise=0.5, memory=0.05, seed=3)
    weights = [policy.reset(TABLE)]
    states = []
    for step in range(400):
        states.append(json.loads(json.dumps(policy.state_dict())))
        weights.append(policy.decide(see(step, weights[-1], (step + 1) / 400)))
    paths = np.log(np.array(weights))
    np.testing.assert_allclose(np.exp(paths).sum(axis=1), 1.0)
    assert 0.4 < np.exp(paths[:, 2]).mean() < 0.75, "around the share that was asked for"
    assert np.abs(np.diff(paths, axis=0)).max() < paths.std(axis=0).max() * 3, "in steps"
    other = make_policy("walk", temperature=0.5, target_share=0.6, noise=0.5, memory=0.05, seed=3)
    other.reset(TABLE)
    other.load_state_dict(states[200])
    np.testing.assert_array_equal(other.decide(see(200, weights[200], 201 / 400)), weights[201])


def test_half_the_interval_walks_as_far():
    """Noise is over the part of the run that has passed, not over decisions."""
    spread = []
    for decisions in (40, 320):
        ends = []
        for seed in range(40):
            policy = make_policy("walk", temperature=0.0, noise=0.8, memory=0.5, seed=seed)
            weights = [policy.reset(TABLE)]
            weights += [policy.decide(see(s, weights[0], (s + 1) / decisions)) for s in range(decisions)]
            ends.append(np.log(weights[-1]) - np.log(weights[0]))
        spread.append(np.std(ends))
    assert spread[0] == pytest.approx(spread[1], rel=0.25)


def test_a_perturbed_policy_strays_from_what_the_policy_would_have_done():
    options = {"inner": "fields", "inner_options": {"source": 0.5}, "memory": 0.1, "seed": 1}
    still = make_policy("perturbed", noise=0.0, **options)
    own = make_policy("fields", source=0.5).reset(TABLE)
    np.testing.assert_allclose(still.reset(TABLE), own, atol=2e-4)
    np.testing.assert_allclose(still.decide(see(0, own, 0.1)), own, atol=2e-4)
    policy = make_policy("perturbed", noise=0.6, **options)
    weights = [policy.reset(TABLE)]
    for step in range(200):
        weights.append(policy.decide(see(step, weights[-1], (step + 1) / 200)))
        if step == 99:
            state = json.loads(json.dumps(policy.state_dict()))
    strayed = np.log(np.array(weights)[:, :3]).mean(axis=0) - np.log(own[:3])
    assert np.abs(strayed - strayed.mean()).max() < 0.6, "around it, however long the run"
    assert np.std(np.log(np.array(weights)[:, 0])) > 0.2
    other = make_policy("perturbed", noise=0.6, **options)
    other.reset(TABLE)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.decide(see(100, weights[100], 101 / 200)), weights[101])
    assert make_policy("perturbed", inner="influence").needs == {"influence"}
