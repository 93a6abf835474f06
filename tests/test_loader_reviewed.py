"""What went wrong once: interrupts, schedules at the edges, changes that were set ahead, states that do not fit."""

import contextlib
import json
import signal
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from corpora import tagged_domains
from mixing import assert_same_batches, train

from mixloader import Mixer, MixLoader, Schedule
from mixloader.errors import ConfigError, StateError, WeightsError
from mixloader.record import read_record
from mixloader.replay import replay


@pytest.fixture
def data(tmp_path):
    return tagged_domains(tmp_path, {"web": [700, 300], "code": [400], "math": [90]})


def domains_of(batches):
    return [set(batch["domain_ids"].tolist()) for batch in batches]


class Interrupted(Exception):
    pass


def test_G4_an_interrupt_at_any_moment_gives_no_batch_of_another_step(data):
    def interrupt(*_):
        raise Interrupted

    with MixLoader(data, 4, 8, max_steps=3000) as loader:
        expected = {batch["step"]: batch["input_ids"] for batch in loader}
    before = signal.signal(signal.SIGALRM, interrupt)
    rng, interrupts = np.random.default_rng(0), 0
    try:
        while interrupts < 20:  # as many passes as it takes
            with MixLoader(data, 4, 8, max_steps=3000) as loader:
                interrupts += draw_under_alarms(loader, expected, rng)
    finally:
        signal.signal(signal.SIGALRM, before)


def draw_under_alarms(loader, expected, rng):
    """Draws to the end, interrupted at random moments; returns how often."""
    interrupts, last = 0, -1
    while loader.step < loader.max_steps:
        try:
            signal.setitimer(signal.ITIMER_REAL, 20e-6 + 300e-6 * rng.random())
            for batch in loader:
                assert batch["step"] > last
                last = batch["step"]
                assert torch.equal(batch["input_ids"], expected[last])
        except Interrupted:
            interrupts += 1
        finally:
            with contextlib.suppress(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, 0)
    return interrupts


@pytest.mark.parametrize("workers", [0, 1])
def test_a_knot_is_not_missed_by_a_state_saved_inside_the_step_before(data, workers):
    schedule = Schedule.piecewise({0: [1, 0, 0], 3: [0, 1, 0]})
    options = {"weights": schedule, "grad_accumulation_steps": 2, "num_workers": workers}
    with MixLoader(data, 4, 8, **options) as loader:
        list(islice(loader, 5))
        state = json.loads(json.dumps(loader.state_dict()))
        assert loader.weights[1] == 1
    with MixLoader(data, 4, 8, **options) as loader:
        loader.load_state_dict(state)
        assert domains_of(islice(loader, 3)) == [{0}, {1}, {1}]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_schedule_is_not_asked_past_max_steps_and_fails_at_its_step(data, workers):
    table = [[1, 1, 1]] * 10
    with MixLoader(data, 4, 8, weights=lambda step: table[step], max_steps=10, num_workers=workers) as loader:
        assert len(list(loader)) == 10
    with MixLoader(data, 4, 8, weights=lambda step: table[step], num_workers=workers) as loader:
        assert len(list(islice(loader, 10))) == 10
        with pytest.raises(IndexError):
            next(loader)
        assert loader.step == 10, "nothing is lost"


def test_a_schedule_far_ahead_costs_nothing(data):
    with MixLoader(data, 4, 8, weights=Schedule.linear({0: [1, 0, 0], 10**9: [0, 1, 0]})) as loader:
        assert loader.units_at(10**9)[1] == 2**30
        assert loader.set_weights([0, 0, 1], step=10**8) == 10**8
        assert loader.units_at(10**8 + 1)[2] == 2**30
        assert 0 < loader.units_at(10**8 - 1)[1] < 2**30
        assert len(loader.state_dict()["weights"]) == 2


def test_a_state_with_a_schedule_needs_that_schedule(data):
    with MixLoader(data, 4, 8, weights=Schedule.piecewise({0: [1, 0, 0], 9: [0, 1, 0]})) as loader:
        next(loader)
        state = loader.state_dict()
    for weights in (None, Schedule.piecewise({0: [1, 0, 0], 8: [0, 1, 0]}), lambda step: [1, 1, 1]):
        with MixLoader(data, 4, 8, weights=weights) as loader, pytest.raises(StateError, match="schedule"):
            loader.load_state_dict(state)
    with MixLoader(data, 4, 8, weights=Schedule.piecewise({0: [1, 0, 0], 9: [0, 1, 0]})) as loader:
        loader.set_weights([0, 0, 1])
        loader.load_state_dict(state)
        assert domains_of(islice(loader, 9)) == [{0}] * 8 + [{1}], "it holds again"


def test_changes_set_for_later_do_not_bring_a_removed_domain_back(data):
    with MixLoader(data, 4, 8) as loader:
        loader.set_weights([1, 1, 1], step=3)
        loader.set_weights([0, 1, 0], step=5)
        loader.remove_domain("code")
        assert all(1 not in domains for domains in domains_of(islice(loader, 9)))
        with pytest.raises(WeightsError, match="already"):
            loader.remove_domain("code")
    with MixLoader({name: data[name] for name in ("web", "code")}, 4, 8) as loader:
        loader.set_weights([1, 0], step=3)
        loader.add_domain("math", data["math"], 0.5)
        assert loader.units_at(3).tolist() == [2**29, 0, 2**29]


def test_the_agent_decides_the_same_after_a_resume_of_a_run_that_grew(data):
    fields = {"web": "source", "code": "target"}
    two = {name: {"path": data[name], "field": field} for name, field in fields.items()}
    with MixLoader(two, 4, 8, seed=3) as loader, Mixer(loader, "agent", token_budget=4 * 8 * 40) as mixer:
        train(loader, mixer, 5)
        mixer.add_domain("math", data["math"], 0.3)
        train(loader, mixer, 8)
        saved = json.loads(json.dumps([loader.state_dict(), mixer.state_dict()]))
        manifest = loader.manifest
        expected = train(loader, mixer, 30)
    with MixLoader(manifest, 4, 8, seed=3) as loader, Mixer(loader, "agent", token_budget=4 * 8 * 40) as mixer:
        loader.load_state_dict(saved[0])
        mixer.load_state_dict(saved[1])
        assert_same_batches(train(loader, mixer, 30), expected)


def test_changes_inside_skipped_steps_are_in_the_record(data, tmp_path):
    with MixLoader(data, 4, 8) as loader, Mixer(loader, "natural", record=tmp_path / "r.jsonl") as mixer:
        loader.set_weights([1, 0, 0], step=2)
        batches = train(loader, mixer, 1)
        mixer.skip(4)
        batches += train(loader, mixer, 12)
        manifest = loader.manifest
    with replay(read_record(tmp_path / "r.jsonl"), manifest, max_steps=12) as again:
        assert_same_batches([b for b in again if not 1 <= b["step"] < 5], batches)


def test_a_change_of_length_counts_packed_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.append(rng.integers(1, 99, n), 0) for n in rng.integers(2, 9, 200)]).astype("<u2")
    tokens.tofile(tmp_path / "a.bin")
    options = {"documents": "eot", "eot": 0, "packing": "best_fit"}
    with MixLoader({"a": tmp_path / "a.bin"}, 1, 16, **options) as loader:
        list(islice(loader, int(loader.windows[0])))
        state = loader.state_dict()
    with MixLoader({"a": tmp_path / "a.bin"}, 1, 32, **options) as loader:
        loader.load_state_dict(state)
        assert loader.accounts()["a"].epochs == 1


def test_limits_hold_for_one_length(data):
    with MixLoader(data, 4, 8, max_epochs=2) as loader:
        next(loader)
        state = loader.state_dict()
    with MixLoader(data, 4, 16, max_epochs=2) as loader, pytest.raises(StateError, match="one length"):
        loader.load_state_dict(state)
    with pytest.raises(ConfigError, match="no limit"):
        MixLoader(data, 4, 8, max_epochs={"web": float("inf")})


def test_a_decimal_limit_is_what_is_written(tmp_path):
    data = tagged_domains(tmp_path, {"a": [801]})
    for epochs, windows in ((0.29, 29), (0.57, 57), (0.58, 58)):
        with MixLoader(data, 1, 8, max_epochs=epochs) as loader:
            assert len(list(loader)) == windows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", 5), ("weights", [[0, 0]]), ("weights", [["a", 0, [2**30, 0, 0]]]), ("step", -1), ("step", 2**64),
        ("removed", 3), ("removed", [["web"]]), ("seq_len", 2**63), ("cursors", [2**64, 0, 0]), ("global_batch", "x"),
        ("global_batch", 1.5), ("global_batch", None), ("residuals", [2**63, -(2**63), 0]), ("prior", [1, 2, 3]),
        ("schedule", 7), ("tokens_before", [0.5, 0, 0]),
    ],
)  # fmt: skip
def test_any_damage_of_a_state_is_a_state_error(data, key, value):
    with MixLoader(data, 4, 8) as loader:
        next(loader)
        state = loader.state_dict() | {key: value}
        with pytest.raises(StateError):
            loader.load_state_dict(state)
        with pytest.raises(StateError):
            loader.load_state_dict(None)
        next(loader)


@pytest.mark.parametrize(
    "weights",
    [
        np.array([2**62, 2**62, 2**63 - 2**62 * 1 - 1]),
        ["0.5", "0.2", "0.3"],
        [10**400, 1, 1],
        np.array([1 + 2j, 1, 1]),
    ],
)
def test_odd_weights_are_no_units(data, weights):
    with MixLoader(data, 4, 8) as loader:
        try:
            loader.set_weights(weights)
        except WeightsError:
            return
        assert loader.units.sum() == 2**30


def test_tensors_of_any_kind_are_weights(data):
    with MixLoader(data, 4, 8) as loader:
        for tensor in (torch.tensor([1.0, 0, 1], requires_grad=True), torch.tensor([1, 0, 1], dtype=torch.bfloat16)):
            loader.set_weights(tensor)
            assert loader.weights.tolist() == [0.5, 0, 0.5]
        for step in (-1, 1.5, "3", True):
            with pytest.raises(WeightsError, match="step is"):
                loader.set_weights([1, 1, 1], step=step)


def test_the_state_is_to_be_had_after_close(data):
    with MixLoader(data, 4, 8) as loader:
        next(loader)
        state = loader.state_dict()
    assert loader.state_dict() == state


def test_close_while_another_thread_draws(data):
    for _ in range(50):
        loader = MixLoader(data, 4, 8)
        errors = []

        def draw(loader=loader, errors=errors):
            try:
                while True:
                    next(loader)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=draw)
        thread.start()
        next(loader)
        loader.close()
        thread.join(10)
        assert errors == ["the loader is closed"]


def test_ranks_and_probes_are_checked(data):
    with pytest.raises(ValueError, match="no rank="):
        MixLoader(data, 4, 8, world_size=4)
    with MixLoader(data, 4, 8) as loader:
        for options in ({"seed": -1}, {"seed": 1.5}, {"batch_size": 0}):
            with pytest.raises(ValueError, match="expected an integer"):
                loader.probe("web", **options)
