"""What trackers are told of a run, and that they cannot harm it."""

import json
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from mixing import Told, train
from tiny_run import FIELDS, tiny_config, tiny_data

from mixloader import MixLoader
from mixloader.errors import ConfigError
from mixloader.mixer import Mixer
from mixloader.trackers import JsonLines, MixtureTracker, TensorBoard, WandB, open_trackers
from mixloader.train.trainer import Trainer
from mixloader.train.trainer import train as train_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.told, self.closed = [], False

    def log(self, step, values):
        self.told.append((step, dict(values)))

    def close(self):
        self.closed = True


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def follow(observation):
    return np.nan_to_num(observation.loss.value, nan=1.0) + 1.0


def test_each_decision_is_told_as_it_takes_effect(data):
    kept = Kept()
    with MixLoader(data, 4, 16) as loader:
        mixer, steps, expected = Mixer(loader, Told(follow), decide_every=2, lag=1), {}, {}
        with MixtureTracker(mixer, [kept]) as tracker, mixer:
            mixer.feedback({"target": 3.5})
            batches = iter(tracker.timed(loader))
            for step in range(7):
                batch = next(batches)
                losses = torch.full(batch["targets"].shape, 2.0).flatten()
                ids = batch["domain_ids"].repeat_interleave(16)
                mixer.stats.add(losses, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=bool))
                mixer.step()
                steps[step + 1], expected[step + 1] = loader.weights, loader.accounts()
        told = dict(kept.told)
        # Decided at 1, 3 and 5, in force at 3, 5 and 7; nothing is told twice.
        assert [step for step, _ in kept.told] == [3, 5, 7]
        for step, values in told.items():
            for d, name in enumerate(FIELDS):
                assert values[f"mix/weight/{name}"] == steps[step][d]
                assert values[f"mix/tokens/{name}"] == expected[step][name].tokens
                assert values[f"mix/epochs/{name}"] == expected[step][name].epochs
                loss = values.get(f"mix/loss/{name}")
                assert loss is None or loss == pytest.approx(2.0)
            assert sum(f"mix/loss/{name}" in values for name in FIELDS) > 0
            assert 0 <= values["mix/policy_ms"] < 60_000
            assert values["loader/wait_ms"] >= 0
            assert values["loader/tok_per_s"] > 0
            assert values["loader/queue_depth"] >= 0
            assert all(math.isfinite(value) for value in values.values())
        assert told[3]["mix/feedback/target"] == 3.5
        assert "mix/feedback/target" not in told[7]
    assert kept.closed


def test_an_objective_is_told_as_weights(data):
    kept = Kept()
    with MixLoader(data, 4, 16, weights={"prose": 1, "code": 1, "maths": 2}) as loader:
        mixer = Mixer(loader, Told(lambda _: [1, 1, 8]), act="objective")
        with MixtureTracker(mixer, [kept]), mixer:
            train(loader, mixer, 3)
    assert kept.told[-1][1]["mix/weight/maths"] == pytest.approx(0.8)


def test_other_ranks_open_nothing(data, tmp_path):
    with MixLoader(data, 4, 16) as loader:
        mixer = Mixer(loader, Told(follow))
        object.__setattr__(loader, "rank", 1)
        with MixtureTracker(mixer, [JsonLines(tmp_path / "a.jsonl")]) as tracker, mixer:
            train(loader, mixer, 3)
            tracker.log(3, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_told_nothing_more(data):
    class Failing(Kept):
        def log(self, step, values):
            super().log(step, values)
            raise ConnectionError("no route")

    failing, kept = Failing(), Kept()
    with MixLoader(data, 4, 16) as loader:
        mixer = Mixer(loader, Told(follow))
        with (
            MixtureTracker(mixer, [failing, kept]),
            mixer,
            pytest.warns(RuntimeWarning, match="Failing failed at plan step 2 and is told nothing more: Conn") as told,
        ):
            train(loader, mixer, 4)
    assert len(told) == len(failing.told) == 1
    assert [step for step, _ in kept.told] == [2, 3, 4, 5]


def test_a_resumed_run_leaves_the_lines_of_the_whole_one(data, tmp_path, monkeypatch):
    def tracked(out):
        untimed = {
            "mix/policy_ms",
            "loader/wait_ms",
            "loader/tok_per_s",
            "loader/queue_depth",
            "train/tokens_per_second",
        }
        found = [{k: v for k, v in line.items() if k not in untimed} for line in lines(out / "mixture.jsonl")]
        return [line for line in found if len(line) > 1]

    config = tiny_config(data, tmp_path / "whole", trackers=["jsonl"], influence={}, feedback=True)
    train_run(config)
    expected = tracked(tmp_path / "whole")
    assert {"mix/influence/target/code", "mix/feedback/source", "held_out/maths", "train/loss"} <= set().union(
        *expected
    )

    class Killed(Exception):
        pass

    def die(self, batches, real=Trainer._train_step):
        if self.step == 7:
            raise Killed
        return real(self, batches)

    config = tiny_config(data, tmp_path / "died", trackers=["jsonl"], influence={}, feedback=True)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", die)
        with pytest.raises(Killed):
            train_run(config)
    with (tmp_path / "died" / "mixture.jsonl").open("a") as file:
        file.write('{"step":7,"mix/wei')
    train_run(config)
    assert tracked(tmp_path / "died") == expected


def test_event_files_hold_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'mixloader[track]')")
    board = TensorBoard(tmp_path)
    board.log(3, {"mix/weight/web": 0.25})
    board.log(4, {"mix/weight/web": 0.5})
    board.close()
    resumed = TensorBoard(tmp_path)
    resumed.log(4, {"mix/weight/web": 0.75})
    resumed.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("mix/weight/web")] == [(3, 0.25), (4, 0.75)]


def test_weights_and_biases_offline(tmp_path):
    """In a process of its own: it starts threads and processes."""
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'mixloader[track]')")
    code = """
import sys
from mixloader.trackers import WandB
run = WandB(project="p", name="n", dir=sys.argv[1], mode="offline")
run.log(3, {"mix/weight/web": 0.25})
run.log(4, {"mix/weight/web": 0.5})
run.close()
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120, capture_output=True)
    (found,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"mix/weight/web" in found.read_bytes()


def test_weights_and_biases_is_told_the_step(monkeypatch):
    told = []

    class Run:
        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("end")

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()
    fake.init = lambda **options: told.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = WandB(project="p")
    assert told == []
    run.log(3, {"a": 1.0})
    run.close()
    assert told == [{"project": "p"}, (3, {"a": 1.0}), "end"]


def test_what_is_missing_or_unknown_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, words in (("tensorboard", "package tensorboard"), ("wandb", "package wandb"), ("mlflow", "'mlflow'")):
        with pytest.raises(ConfigError, match=words):
            open_trackers([name], tmp_path)
