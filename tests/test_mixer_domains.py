"""A Mixer whose domains change in mid-run, or which leaves out steps: observations, resume, record and replay."""

import json

import numpy as np
import pytest
import torch
from corpora import tagged_domains
from mixing import RandomWalk, Told, assert_same_batches, kill, train

from mixloader import Manifest, Mixer, MixLoader
from mixloader.errors import MixLoaderError, RecordError
from mixloader.record import read_record
from mixloader.replay import replay


@pytest.fixture
def data(tmp_path):
    return Manifest.open(tagged_domains(tmp_path / "data", {"web": [700, 300], "code": [400], "math": [90]}))


@pytest.fixture
def two(data):
    return Manifest(data.domains[:2])


def open_loader(data, **options):
    return MixLoader(data, 4, 8, seed=3, num_workers=0, **options)


def shards_of(data, name):
    return [shard.path for shard in data.domain(name).shards]


def test_an_added_domain_is_observed_and_mixed(data, two):
    policy = Told(lambda observation: np.arange(1.0, len(observation.weights) + 1))
    with open_loader(two) as loader, Mixer(loader, policy) as mixer:
        train(loader, mixer, 4)
        mixer.add_domain("math", shards_of(data, "math"), 0.5)
        batches = train(loader, mixer, 12)
    assert any(2 in batch["domain_ids"].tolist() for batch in batches)
    assert [len(o.weights) for o in policy.seen] == [2] * 4 + [3] * 8
    last = policy.seen[-1]
    assert last.loss.age[2] == 0
    assert np.isfinite(last.loss.value).all()


def test_domains_are_changed_through_the_mixer(data, two):
    with open_loader(two) as loader, Mixer(loader, "natural") as mixer:
        train(loader, mixer, 2)
        loader.add_domain("math", shards_of(data, "math"), 0.5)
        next(loader)
        with pytest.raises(MixLoaderError, match=r"mixer: add_domain\(\)"):
            mixer.step()


def test_a_policy_cannot_weigh_a_removed_domain(data):
    with open_loader(data) as loader, Mixer(loader, "uniform") as mixer:
        train(loader, mixer, 2)
        mixer.remove_domain("code")
        batches = train(loader, mixer, 10)
    assert {d for batch in batches for d in batch["domain_ids"].tolist()} == {0, 2}


def grow(data, loader, mixer, until):
    """Trains to `until`, with domains changed on the way."""
    batches = []
    for step in range(loader.step, until):
        if step == 5:
            mixer.add_domain("math", shards_of(data, "math"), 0.25)
        if step == 9:
            mixer.split_domain("web", {"old": [0], "new": [1]})
        batches += train(loader, mixer, step + 1)
    return batches


@pytest.mark.parametrize("stop", [3, 5, 7, 9, 11])
def test_a_run_that_grew_resumes_and_replays_exactly(data, two, tmp_path, stop):
    with open_loader(two) as loader, Mixer(loader, RandomWalk(), record=tmp_path / "whole.jsonl") as mixer:
        whole = grow(data, loader, mixer, 14)
        manifest = loader.manifest
        state = mixer.state_dict()

    with open_loader(two) as loader:
        mixer = Mixer(loader, RandomWalk(), record=tmp_path / "parts.jsonl")
        grow(data, loader, mixer, stop)
        saved = json.loads(json.dumps({"loader": loader.state_dict(), "mixer": mixer.state_dict()}, allow_nan=False))
        grown = loader.manifest
        grow(data, loader, mixer, min(stop + 3, 14))
        kill(mixer)
    with open_loader(grown) as loader, Mixer(loader, RandomWalk(), record=tmp_path / "parts.jsonl") as mixer:
        loader.load_state_dict(saved["loader"])
        mixer.load_state_dict(saved["mixer"])
        assert_same_batches(grow(data, loader, mixer, 14), [b for b in whole if b["step"] >= stop])
        assert mixer.state_dict() == state

    ours, theirs = read_record(tmp_path / "parts.jsonl"), read_record(tmp_path / "whole.jsonl")
    assert ours.decisions == theirs.decisions
    assert ours.header["domains"] == ["web", "code", "math", "old", "new"]
    for record in (ours, theirs):
        with replay(record, manifest, max_steps=14) as again:
            assert_same_batches(list(again), whole)
    with pytest.raises(RecordError, match="fingerprint"):
        replay(ours, two)


def test_skipped_steps_are_in_the_record_and_the_replay_knows_what_they_held(data, tmp_path):
    with open_loader(data) as loader, Mixer(loader, RandomWalk(), record=tmp_path / "r.jsonl") as mixer:
        batches = train(loader, mixer, 6)
        assert mixer.skip(5) == 11
        batches += train(loader, mixer, 15)
    record = read_record(tmp_path / "r.jsonl")
    assert [event["steps"] for event in record.events if event["event"] == "skip"] == [5]
    with replay(record, data, max_steps=15) as again:
        assert_same_batches([batch for batch in again if not 6 <= batch["step"] < 11], batches)
    counted = sum(np.array(decision["counts"]) for decision in record.decisions)
    read = np.bincount(torch.cat([batch["domain_ids"] for batch in batches]), minlength=3)
    assert counted.tolist() == read.tolist(), "what was skipped was not read"


def test_policies_see_the_mixture_of_the_domains_that_are_left(data, tmp_path):
    policy = Told(lambda observation: None)
    options = {"weights": [1, 1, 2], "max_epochs": {"math": 1}}
    with open_loader(data, **options) as loader, Mixer(loader, policy, record=tmp_path / "r.jsonl") as mixer:
        batches = train(loader, mixer, 20)
        assert loader.exhausted == ("math",)
        assert np.allclose(loader.effective_weights, [0.5, 0.5, 0])
        assert np.allclose(loader.weights, [0.25, 0.25, 0.5])
    last = max(batch["step"] for batch in batches if 2 in batch["domain_ids"].tolist())
    for observation in policy.seen:
        assert np.allclose(observation.weights, [0.5, 0.5, 0] if observation.step >= last else [0.25, 0.25, 0.5])
    record = read_record(tmp_path / "r.jsonl")
    assert [(e["step"], e["domain"]) for e in record.events if e["event"] == "exhausted"] == [(last, "math")]
    with replay(record, data, max_steps=20) as again:
        assert_same_batches(list(again), batches)
