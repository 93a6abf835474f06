"""The Mixer: a strict clock, exact observations, exact resume, and policies that fail."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import tagged_domains
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixing import RandomWalk, Told, assert_same_batches, count, kill, token_losses, train

from mixloader import Manifest, MixLoader
from mixloader.errors import ConfigError, MixLoaderError, StateError, StatsError, WeightsError
from mixloader.mixer import Mixer
from mixloader.mixture import as_fractions
from mixloader.record import read_record
from mixloader.replay import replay

T = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return Manifest.open(tagged_domains(folder, {"web": [700, 300], "code": [400], "math": [90]}))


def open_loader(data, accumulation=1, **options):
    return MixLoader(data, 4, T, grad_accumulation_steps=accumulation, seed=3, num_workers=0, **options)


def decided(observation):
    """One domain at a time: the decision after step s wants nothing but domain s % 3."""
    return np.eye(3)[observation.step % 3]


# The clock


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_decision_after_step_s_rules_from_step_s_plus_1_plus_lag(data, lag, every, accumulation):
    policy = Told(decided)
    with open_loader(data, accumulation) as loader, Mixer(loader, policy, lag=lag, decide_every=every) as mixer:
        batches = train(loader, mixer, 14)
    for batch in batches:
        sources = [s for s in range(batch["step"] - lag) if (s + 1) % every == 0]
        if sources:
            assert set(batch["domain_ids"].tolist()) == {sources[-1] % 3}
        else:
            assert batch["weights_version"] == 0
    assert [o.step for o in policy.seen] == list(range(every - 1, 14, every))
    assert all(o.effect_step == o.step + 1 + lag for o in policy.seen)


def test_weights_of_reset_rule_from_the_first_step(data):
    with open_loader(data) as loader, Mixer(loader, Told(lambda o: None, first=[0, 0, 5])) as mixer:
        batches = train(loader, mixer, 4)
    assert {d for batch in batches for d in batch["domain_ids"].tolist()} == {2}


def test_a_slow_policy_is_waited_for_and_the_waits_are_counted(data):
    def slow(observation):
        time.sleep(0.02)
        return decided(observation)

    with open_loader(data) as loader, Mixer(loader, Told(slow)) as mixer:
        batches = train(loader, mixer, 6)
        assert mixer.waits > 0
    assert [set(batch["domain_ids"].tolist()) for batch in batches[2:]] == [{0}, {1}, {2}, {0}]
    with open_loader(data) as loader, Mixer(loader, Told(slow), lag=0) as mixer:
        train(loader, mixer, 2)
        assert mixer.waits == 0, "with lag 0 there is nothing else to do"


def test_a_fast_policy_is_not_waited_for(data):
    with open_loader(data) as loader, Mixer(loader, "uniform") as mixer:
        for _ in range(5):
            train(loader, mixer, loader.step + 1)
            time.sleep(0.05)
        assert mixer.waits == 0


def test_step_in_the_wrong_place_is_refused_at_once(data):
    with open_loader(data, accumulation=2) as loader, Mixer(loader, "natural") as mixer:
        with pytest.raises(MixLoaderError, match="to end plan step 0, but the loader stands 0 rows into step 0"):
            mixer.step()
        next(loader)
        with pytest.raises(MixLoaderError, match="to end plan step 0, but the loader stands 4 rows into step 0"):
            mixer.step()
        next(loader)
        mixer.step()
        train(loader, mixer, 2)
        with pytest.raises(MixLoaderError, match="to end plan step 2, but the loader stands 0 rows into step 2"):
            mixer.step()
        next(loader), next(loader), next(loader)
        with pytest.raises(MixLoaderError, match="to end plan step 2, but the loader stands 4 rows into step 3"):
            mixer.step()
        with pytest.raises(MixLoaderError, match=r"stands at plan step 3, but mixer.step\(\) has not ended step 2"):
            mixer.state_dict()


def test_a_mixer_may_join_in_the_middle_of_a_step(data):
    with open_loader(data, accumulation=2) as loader:
        for _ in range(3):
            next(loader)
        with Mixer(loader, Told(decided, first=[0, 0, 1])) as mixer:
            rest = next(loader)
            mixer.step()
            batches = train(loader, mixer, 5)
    assert rest["weights_version"] == 0
    assert set(batches[0]["domain_ids"].tolist()) == {2}
    assert set(batches[2]["domain_ids"].tolist()) == {1}, "decided after step 1, from step 3"


# Observations


@pytest.mark.parametrize(("lag", "every"), [(0, 1), (1, 3), (2, 1), (2, 2)])
def test_observations_are_what_the_batches_say(data, lag, every):
    walk, seen = RandomWalk(), []

    def decide(observation):
        seen.append(observation)
        return walk.decide(observation)

    policy = Told(decide)
    policy.reset = walk.reset
    with open_loader(data, accumulation=2) as loader:
        with Mixer(loader, policy, lag=lag, decide_every=every, token_budget=1000) as mixer:
            batches = train(loader, mixer, 12)
        windows = loader.windows
    steps = torch.tensor([batch["step"] for batch in batches])
    domains = torch.stack([batch["domain_ids"] for batch in batches])
    losses = torch.stack([token_losses(batch) for batch in batches])

    def rows(first, last, domain):
        return losses[(steps >= first) & (steps <= last)][(domains == domain)[(steps >= first) & (steps <= last)]]

    for before, now in pairwise([None, *seen]):
        first = before.step + 1 if before else 0
        assert now.tokens == (now.step + 1) * 2 * 4 * T
        assert now.tokens_since == (now.step + 1 - first) * 2 * 4 * T
        assert now.progress == min(1.0, now.tokens / 1000)
        for d in range(3):
            read = rows(first, now.step, d)
            assert now.seen[d] == rows(0, now.step, d).numel()
            assert now.epochs[d] == now.seen[d] / T / windows[d]
            if read.numel():
                assert (now.loss.age[d], now.loss.count[d]) == (0, read.numel())
                assert now.loss.value[d] == read.mean()
                assert math.isclose(now.loss_std[d], read.std(correction=0), abs_tol=1e-12)
            elif before is None or before.loss.age[d] < 0:
                assert (now.loss.age[d], now.loss.count[d]) == (-1, 0)
                assert np.isnan(now.loss.value[d])
                assert np.isnan(now.loss_std[d])
            else:
                assert now.loss.age[d] == before.loss.age[d] + now.step - before.step
                assert (now.loss.value[d], now.loss.count[d]) == (before.loss.value[d], before.loss.count[d])


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_the_observed_weights_are_those_that_the_effect_step_would_have(data, tmp_path, lag):
    walk = RandomWalk()
    policy = Told(walk.decide)
    policy.reset = walk.reset
    path = tmp_path / "record.jsonl"
    with open_loader(data) as loader, Mixer(loader, policy, lag=lag, record=path) as mixer:
        train(loader, mixer, 12)
    record = read_record(path)
    for observation in policy.seen:
        before = record.units_at(observation.effect_step - 1)
        assert np.array_equal(observation.weights, as_fractions(before))


def test_what_a_policy_does_to_its_observation_stays_there(data):
    def vandal(observation):
        for array in (observation.loss.value, observation.loss_std, observation.weights, observation.epochs):
            array[:] = -7
        for array in (observation.loss.count, observation.loss.age, observation.seen):
            array[:] = -7

    def seen_by(decide):
        kept = []

        def keep(observation):
            kept.append([np.array(a) for a in (observation.loss.value, observation.seen, observation.weights)])
            return decide(observation)

        with open_loader(data) as loader, Mixer(loader, Told(keep), lag=0) as mixer:
            train(loader, mixer, 6)
        return kept

    for ours, theirs in zip(seen_by(vandal), seen_by(lambda o: None), strict=True):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(ours, theirs, strict=True))


def test_feedback_is_carried_with_its_age(data):
    policy = Told(lambda o: None)
    with open_loader(data) as loader, Mixer(loader, policy, lag=0) as mixer:
        mixer.feedback({"math": torch.tensor(3.5)})
        train(loader, mixer, 3)
        mixer.feedback({"source": 2.0, "math": 3.0})
        train(loader, mixer, 5)
    seen = [{name: (float(s.value), int(s.count), int(s.age)) for name, s in o.feedback.items()} for o in policy.seen]
    assert seen == [
        {"math": (3.5, 1, 1)},
        {"math": (3.5, 1, 2)},
        {"math": (3.5, 1, 3)},
        {"math": (3.0, 1, 1), "source": (2.0, 1, 1)},
        {"math": (3.0, 1, 2), "source": (2.0, 1, 2)},
    ]


def test_feedback_is_in_the_record_once_and_with_the_next_decision(data, tmp_path):
    path = tmp_path / "record.jsonl"
    with open_loader(data) as loader, Mixer(loader, "natural", decide_every=2, record=path) as mixer:
        mixer.feedback({"web": 1.25})
        train(loader, mixer, 4)
        mixer.feedback({"web": 1.5, "source": 2.0})
        train(loader, mixer, 8)
        mixer.feedback({"web": 1.75})
    record = read_record(path)
    assert [(d["step"], d.get("feedback")) for d in record.decisions] == [
        (1, {"web": 1.25}),
        (3, None),
        (5, {"web": 1.5, "source": 2.0}),
        (7, None),
    ]
    assert [(e["step"], e["losses"]) for e in record.events if e["event"] == "feedback"] == [
        (-1, {"web": 1.25}),
        (3, {"web": 1.5, "source": 2.0}),
        (7, {"web": 1.75}),
    ]


def test_without_a_token_budget_that_of_max_steps_counts(data):
    open_end, bounded = Told(lambda o: None), Told(lambda o: None)
    with open_loader(data) as loader, Mixer(loader, open_end) as mixer:
        train(loader, mixer, 2)
    with open_loader(data, max_steps=4) as loader, Mixer(loader, bounded) as mixer:
        train(loader, mixer, 2)
    assert [math.isnan(o.progress) for o in open_end.seen] == [True, True]
    assert [o.progress for o in bounded.seen] == [0.25, 0.5]


def test_long_intervals_are_summed_from_several_snapshots(data, monkeypatch):
    def losses_seen():
        policy = Told(lambda o: None)
        with open_loader(data) as loader, Mixer(loader, policy, decide_every=5) as mixer:
            train(loader, mixer, 10)
        return [(o.loss.value, o.loss.count) for o in policy.seen]

    at_once = losses_seen()
    monkeypatch.setattr("mixloader.mixer.MAX_TOKENS", 2 * 4 * T)  # room for two steps
    monkeypatch.setattr("mixloader.stats.MAX_TOKENS", 2 * 4 * T)
    assert np.array_equal(losses_seen(), at_once)


# Changes by hand


def test_a_change_by_hand_holds_against_decisions_that_did_not_know_of_it(data):
    policy = Told(decided)
    with open_loader(data) as loader, Mixer(loader, policy, lag=2) as mixer:
        batches = train(loader, mixer, 6)
        loader.set_weights([1, 1, 0])
        batches += train(loader, mixer, 11)
    domains = [set(batch["domain_ids"].tolist()) for batch in batches]
    assert domains[3:6] == [{0}, {1}, {2}]
    assert domains[6:9] == [{0, 1}] * 3, "decided after steps 4 and 5, before the change"
    assert domains[9:] == [{0}, {1}], "decided after steps 6 and 7"
    by_hand = next(o for o in policy.seen if o.step == 6)
    assert np.array_equal(by_hand.weights, [0.5, 0.5, 0])


def test_a_change_by_hand_for_a_later_step_is_observed_by_the_decision_on_that_step(data):
    policy = Told(decided)
    with open_loader(data) as loader, Mixer(loader, policy, lag=2) as mixer:
        train(loader, mixer, 2)
        loader.set_weights([1, 1, 2], step=8)
        train(loader, mixer, 8)
    assert np.array_equal(policy.seen[4].weights, [1, 0, 0]), "for step 7: decided after step 3"
    assert np.array_equal(policy.seen[5].weights, [0.25, 0.25, 0.5]), "for step 8"
    assert np.array_equal(policy.seen[6].weights, [0, 0, 1]), "for step 9: decided after step 5"


CHANGES = {
    "before a step": {(4, 0): ([1, 1, 2], None)},
    "inside a group": {(4, 1): ([1, 1, 2], None)},
    "after a step": {(4, 2): ([1, 1, 2], None)},
    "before the first step": {(0, 0): ([5, 1, 2], None)},
    "ahead of time": {(2, 0): ([1, 1, 2], 8)},
    "twice around one draw": {(4, 0): ([1, 1, 2], None), (4, 1): ([2, 1, 1], None)},
    "in a row, ahead of time": {(0, 1): ([1, 1, 2], 5), (1, 0): ([3, 1, 2], 6), (1, 1): ([1, 7, 2], 7)},
    "there and back": {(4, 0): ([1, 1, 2], None), (4, 2): ([1, 2, 3], None)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("policy", ["natural", RandomWalk()], ids=["natural", "walk"])
def test_changes_by_hand_are_in_the_record(data, tmp_path, changes, policy):
    path = tmp_path / "record.jsonl"
    with open_loader(data, accumulation=2) as loader, Mixer(loader, policy, record=path) as mixer:
        batches = train(loader, mixer, 10, changes)
    with replay(path, data) as again:
        assert_same_batches([next(again) for _ in batches], batches)


def test_a_schedule_by_hand_is_recorded_step_by_step(data, tmp_path):
    path = tmp_path / "record.jsonl"
    with open_loader(data) as loader, Mixer(loader, "uniform", record=path) as mixer:
        used = {}
        for step in range(2, 8):
            loader.set_weights([1, step, step * step], step=step)
            used[step] = loader.units_at(step)
        train(loader, mixer, 9)
    record = read_record(path)
    assert {e["step"]: e["weights"] for e in record.events if e["event"] == "weights"} == {
        step: units.tolist() for step, units in used.items()
    }


# G1 and G2


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_G1_a_replay_draws_the_recorded_stream(data, tmp_path, lag, every, accumulation):
    path = tmp_path / "record.jsonl"
    with (
        open_loader(data, accumulation, weights=[3, 1, 1]) as loader,
        Mixer(loader, RandomWalk(), lag=lag, decide_every=every, record=path) as mixer,
    ):
        batches = train(loader, mixer, 15)
    record = read_record(path)
    assert record.steps == 15
    assert len({tuple(d["weights"]) for d in record.decisions}) >= 15 // every - 4, "the walk keeps a fifth of them"
    for decision in record.decisions:
        assert decision["loss_tokens"] == [count * T for count in decision["counts"]]
        assert [loss is None for loss in decision["loss"]] == [count == 0 for count in decision["counts"]]
    with replay(record, data) as again:
        assert_same_batches([next(again) for _ in batches], batches)
    counts = torch.bincount(
        torch.stack([b["domain_ids"] for b in batches if b["step"] < 15 // every * every]).flatten()
    )
    assert np.array_equal(np.sum([d["counts"] for d in record.decisions], axis=0), counts)


def test_G2_weights_and_record_do_not_depend_on_timing(data, tmp_path):
    runs = []
    for number, delay in enumerate([0.0, 0.01, 0.01]):
        path = tmp_path / f"{number}.jsonl"
        with open_loader(data) as loader, Mixer(loader, RandomWalk(delay), lag=2, record=path) as mixer:
            batches = train(loader, mixer, 15)
            state = json.dumps(mixer.state_dict())
        runs.append((batches, state, path.read_bytes().split(b"\n", 1)[1]))
    for batches, state, lines in runs[1:]:
        assert_same_batches(batches, runs[0][0])
        assert state == runs[0][1]
        assert lines == runs[0][2]


# Resume


def weights_by_hand():
    change = st.tuples(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.none() | st.integers(1, 4))
    place = st.tuples(st.integers(0, 8), st.integers(0, 2))

    def absolute(changes):  # `from which step` counts from the step of the change
        return {at: (w, None if ahead is None else at[0] + ahead) for at, (w, ahead) in changes.items()}

    return st.dictionaries(place, change, max_size=3).map(absolute)


@pytest.mark.parametrize("lag", [0, 1, 2])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    every=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    stop=st.integers(0, 9),
    loader_first=st.booleans(),
    by_hand=weights_by_hand(),
)
def test_G3_a_resumed_run_decides_and_records_as_if_never_stopped(
    data, tmp_path_factory, lag, every, accumulation, stop, loader_first, by_hand
):
    by_hand = {at: change for at, change in by_hand.items() if at[1] <= accumulation}
    folder = tmp_path_factory.mktemp("run")
    options = {"lag": lag, "decide_every": every, "token_budget": 500}

    def part(loader, mixer, until, evaluate=True):
        batches = []
        while loader.step < until:
            batches += train(loader, mixer, loader.step + 1, by_hand)
            if loader.step == 4 and evaluate:
                mixer.feedback({"target": 0.1, "web": 1 / 3})
        return batches

    with (
        open_loader(data, accumulation) as loader,
        Mixer(loader, RandomWalk(), record=folder / "whole.jsonl", **options) as mixer,
    ):
        whole = part(loader, mixer, 10)
        state = mixer.state_dict()

    with open_loader(data, accumulation) as loader:
        mixer = Mixer(loader, RandomWalk(), record=folder / "parts.jsonl", **options)
        part(loader, mixer, stop)
        saved = json.dumps({"loader": loader.state_dict(), "mixer": mixer.state_dict()}, allow_nan=False)
        train(loader, mixer, min(stop + 3, 10), by_hand)  # what is trained after the checkpoint is lost
        kill(mixer)

    saved = json.loads(saved)
    with open_loader(data, accumulation) as loader:
        if loader_first:
            loader.load_state_dict(saved["loader"])
        with Mixer(loader, RandomWalk(), record=folder / "parts.jsonl", **options) as mixer:
            if not loader_first:
                loader.load_state_dict(saved["loader"])
            mixer.load_state_dict(saved["mixer"])
            assert loader.state_dict() == saved["loader"]
            rest = part(loader, mixer, 10)
            assert mixer.state_dict() == state
    assert_same_batches(rest, [batch for batch in whole if batch["step"] >= stop])
    assert [b["weights_version"] for b in rest] == [b["weights_version"] for b in whole if b["step"] >= stop]
    ours, theirs = read_record(folder / "parts.jsonl"), read_record(folder / "whole.jsonl")
    assert (ours.decisions, ours.events, ours.attempts) == (theirs.decisions, theirs.events, 2)


def test_a_state_taken_between_decisions_holds_what_was_measured(data):
    policies = Told(lambda o: None), Told(lambda o: None)
    with open_loader(data, accumulation=2) as loader, Mixer(loader, policies[0], decide_every=4, lag=0) as mixer:
        train(loader, mixer, 4)
    with open_loader(data, accumulation=2) as loader, Mixer(loader, policies[1], decide_every=4, lag=0) as mixer:
        train(loader, mixer, 2)
        count(mixer, next(loader))
        saved = loader.state_dict(), json.loads(json.dumps(mixer.state_dict()))
        mixer.state_dict()
    with open_loader(data, accumulation=2) as loader, Mixer(loader, policies[1], decide_every=4, lag=0) as mixer:
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        count(mixer, next(loader))
        mixer.step()
        train(loader, mixer, 4)
    (whole,), (resumed,) = policies[0].seen, policies[1].seen
    assert np.array_equal(whole.loss.value, resumed.loss.value)
    assert np.array_equal(whole.loss.count, resumed.loss.count)


def test_a_mixer_in_use_can_be_taken_back(data, tmp_path):
    path = tmp_path / "record.jsonl"

    class Walk(RandomWalk):
        def load_state_dict(self, state):
            assert not self.level.any(), "a state is taken up after reset"
            super().load_state_dict(state)

    with open_loader(data) as loader, Mixer(loader, Walk(0.02), lag=2, record=path) as mixer:
        train(loader, mixer, 4)
        saved = loader.state_dict(), mixer.state_dict()
        first = train(loader, mixer, 9)
        end = mixer.state_dict()
        train(loader, mixer, 11)
        count(mixer, next(loader))
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        assert_same_batches(train(loader, mixer, 9), first)
        assert mixer.state_dict() == end
    record = read_record(path)
    assert record.attempts == 2
    assert [d["step"] for d in record.decisions] == list(range(9))


def test_the_state_of_a_full_mixer_fits_in_16_KB(tmp_path):
    data = tagged_domains(tmp_path, {f"domain-number-{i:02d}": [5000] for i in range(16)})
    policy = Told(lambda o: o.weights + 1 / 3)
    policy.state_dict = lambda: {
        "averages": np.random.default_rng(0).random((11, 16)).tolist()
    }  # as many as the agent's
    with open_loader(data, accumulation=8) as loader, Mixer(loader, policy, decide_every=2) as mixer:
        train(loader, mixer, 8)
        mixer.feedback(dict.fromkeys((*loader.names, "source", "target"), 1 / 3))
        count(mixer, next(loader))
        assert len(json.dumps(mixer.state_dict())) <= 16 * 1024


def test_a_state_is_not_ahead_of_the_record(data, tmp_path, monkeypatch):
    write, path = os.write, tmp_path / "record.jsonl"

    def slow(file, content):
        time.sleep(0.02)
        return write(file, content)

    with open_loader(data) as loader, Mixer(loader, RandomWalk(), record=path) as mixer:
        monkeypatch.setattr("mixloader.record.os.write", slow)
        train(loader, mixer, 6)
        mixer.state_dict()
        assert [d["step"] for d in read_record(path).decisions] == [0, 1, 2, 3, 4]
        monkeypatch.undo()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_wait_loses_no_decision(data):
    answer = threading.Event()

    def patient(observation):
        assert answer.wait(30)
        return decided(observation)

    def interrupt():
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        answer.set()

    with open_loader(data) as loader, Mixer(loader, Told(patient), lag=0) as mixer:
        next(loader)
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            mixer.step()
        saved = mixer.state_dict(), loader.state_dict()
        assert set(next(loader)["domain_ids"].tolist()) == {0}, "as was decided after step 0"
    assert saved[0]["pending"] == []
    assert saved[0]["weights_version"] == 1 == len(saved[1]["weights"]) - 1


def test_a_state_of_another_run_or_moment_is_refused(data):
    with open_loader(data) as loader, Mixer(loader, "uniform") as mixer:
        train(loader, mixer, 3)
        early = mixer.state_dict()
        train(loader, mixer, 5)
        state, stream = mixer.state_dict(), loader.state_dict()

    def load(state, stream, *arguments, **options):
        with open_loader(data) as loader, Mixer(loader, *arguments, **options) as mixer:
            loader.load_state_dict(stream)
            mixer.load_state_dict(state)

    load(state, stream, "uniform")
    with pytest.raises(StateError, match="has lag 1; this mixer has 2"):
        load(state, stream, "uniform", lag=2)
    with pytest.raises(StateError, match="has policy 'uniform'; this mixer has 'natural'"):
        load(state, stream, "natural")
    with pytest.raises(StateError, match="has step 3, but the loader has 5; load the state that the loader had when"):
        load(early, stream, "uniform")
    with pytest.raises(StateError, match="has version None; this mixer has 1"):
        load({}, stream, "uniform")
    with (
        open_loader(data) as loader,
        Mixer(loader, "uniform") as mixer,
        pytest.raises(StateError, match="has step 5, but the loader has 0"),
    ):
        mixer.load_state_dict(state)


# Policies and statistics that fail


def raising(observation):
    raise RuntimeError("no idea")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raising, "RuntimeError: no idea"),
        (lambda o: np.full(3, np.nan), "WeightsError: the weight of domain 'web' is nan"),
        (lambda o: [0.5, -0.1, 0.6], "WeightsError: the weight of domain 'code' is -0.1"),
        (lambda o: [0.5, 0.5], "WeightsError: weights have shape [2]; expected [3]"),
        (lambda o: np.zeros(3), "WeightsError: all weights are zero"),
        (lambda o: "half", "WeightsError: weights must be numbers"),
    ],
)
def test_a_policy_that_fails_keeps_the_weights_warns_once_and_is_in_the_record(data, tmp_path, answer, message):
    path = tmp_path / "record.jsonl"

    def sometimes(observation):
        return answer(observation) if observation.step in (2, 3) else decided(observation)

    with open_loader(data) as loader, Mixer(loader, Told(sometimes), record=path) as mixer:
        batches = train(loader, mixer, 3)
        batches.append(next(loader))
        with pytest.warns(RuntimeWarning, match="policy 'Told' failed after plan step 2: ") as warned:
            mixer.step()
        assert str(warned[0].filename) == __file__
        batches += train(loader, mixer, 8)
    domains = [set(batch["domain_ids"].tolist()) for batch in batches]
    assert domains[2:] == [{0}, {1}, {1}, {1}, {1}, {2}], "decided after steps 0, 1, none, none, 4, 5"
    record = read_record(path)
    events = [event for event in record.events if event["event"] == "policy_error"]
    assert [event["source"] for event in events] == [2, 3]
    assert all(event["error"].startswith(message) for event in events)
    assert [d["weights"] for d in record.decisions[2:4]] == [record.decisions[1]["weights"]] * 2


def test_an_error_of_the_statistics_reaches_the_caller_at_a_fixed_step(data, tmp_path):
    path = tmp_path / "record.jsonl"
    with open_loader(data) as loader, Mixer(loader, Told(decided), lag=2, record=path) as mixer:
        train(loader, mixer, 3)
        batch = next(loader)
        batch["domain_ids"] = torch.full((4,), 1)
        losses = torch.full((4 * T,), math.nan)
        some = torch.ones(4 * T, dtype=torch.bool)
        mixer.stats.add(losses, batch["domain_ids"].repeat_interleave(T), some, ~some)
        mixer.step()
        train(loader, mixer, 5)
        count(mixer, next(loader))
        with pytest.raises(StatsError, match=f"{4 * T} in domain 1"):
            mixer.step()
        batches = train(loader, mixer, 9)
    assert [set(b["domain_ids"].tolist()) for b in batches] == [{2}, {1}, {2}], "decided after 2, none, 4, 5"
    record = read_record(path)
    assert [d["step"] for d in record.decisions] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert [e["step"] for e in record.events if e["event"] == "stats_error"] == [5]
    assert sum(record.decisions[3]["counts"]) == 2 * 4, "the rows of both steps"


def test_bad_tokens_of_the_last_steps_are_told_by_close_and_by_state_dict(data):
    with open_loader(data) as loader:
        mixer = Mixer(loader, "natural")
        next(loader)
        some = torch.ones(1, dtype=torch.bool)
        mixer.stats.add(torch.tensor([math.inf]), torch.tensor([0]), some, ~some)
        mixer.step()
        with pytest.raises(StatsError, match="1 in domain 0"):
            mixer.state_dict()
        with pytest.raises(StatsError, match="1 in domain 0"):
            mixer.close()
        assert not policy_threads()


def test_bad_weights_of_reset_are_refused_before_anything_changes(data):
    with open_loader(data) as loader:
        before = loader.state_dict()
        with pytest.raises(WeightsError, match="shape"):
            Mixer(loader, Told(decided, first=[1.0]))
        assert loader.state_dict() == before


def test_wrong_arguments_are_refused(data):
    class Influence(Told):
        needs = frozenset({"influence"})

    with open_loader(data) as loader:
        for name, value in (("lag", -1), ("lag", 1.0), ("decide_every", 0), ("token_budget", 0)):
            with pytest.raises(ConfigError, match=f"{name} is {value!r}; expected a whole number of at least"):
                Mixer(loader, "natural", **{name: value})
        with pytest.raises(ConfigError, match="unknown policy 'magic'"):
            Mixer(loader, "magic")
        with pytest.raises(ConfigError, match="the policy needs the signal 'influence'"):
            Mixer(loader, Influence(decided))
        with Mixer(loader, "natural") as mixer:
            with pytest.raises(ConfigError, match="feedback for 'physics'; expected 'source', 'target' or a domain"):
                mixer.feedback({"web": 1.0, "physics": 1.0})
            with pytest.raises(ConfigError, match="feedback for 'web' is nan"):
                mixer.feedback({"web": math.nan})
        with pytest.raises(MixLoaderError, match="the mixer is closed"):
            mixer.step()
    with (
        open_loader(data, world_size=2, rank=1) as loader,
        pytest.raises(ConfigError, match="the loader has world_size 2"),
    ):
        Mixer(loader, "natural")


# G8


def policy_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mixloader")]


def test_G8_no_thread_is_left_after_close(data, tmp_path):
    with open_loader(data) as loader, Mixer(loader, RandomWalk(0.02), record=tmp_path / "record.jsonl") as mixer:
        train(loader, mixer, 3)
        assert len(policy_threads()) == 2
    assert policy_threads() == []
    mixer.close()


def test_G8_a_process_ends_without_close_and_its_record_is_whole(data, tmp_path):
    path = tmp_path / "record.jsonl"
    program = f"""
        import mixing
        from mixloader import MixLoader
        from mixloader.mixer import Mixer
        loader = MixLoader({str(data_folder(data))!r}, 4, {T})
        mixer = Mixer(loader, mixing.RandomWalk(0.02), record={str(path)!r})
        mixing.train(loader, mixer, 5)
    """
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path]), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    subprocess.run(program, check=True, timeout=60, env=environment)
    record = read_record(path)
    assert not record.torn
    assert [d["step"] for d in record.decisions] == [0, 1, 2, 3]


def data_folder(data):
    return Path(data.domains[0].shards[0].path).parent.parent
