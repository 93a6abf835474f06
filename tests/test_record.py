"""The run record: lines, damage, writers that die, resumes, replay."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import tagged_domains
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import RandomWalk, assert_same_batches, train

from mixloader import Manifest, MixLoader
from mixloader.errors import RecordError
from mixloader.mixer import Mixer
from mixloader.mixture import WEIGHT_ONE, quantize
from mixloader.record import Recorder, read_record
from mixloader.replay import replay

HEADER = {
    "manifest": "f00d",
    "seed": 3,
    "global_batch": 8,
    "batch_size": 4,
    "seq_len": 16,
    "step": 0,
    "domains": ["web", "math"],
    "weights": [WEIGHT_ONE, 0],
}
RESUME = {"type": "event", "event": "resume"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return Manifest.open(tagged_domains(folder, {"web": [700, 300], "code": [400], "math": [90]}))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "record.jsonl"


def decide(recorder, step, share=0.25, **changed):
    values = {
        "step": step,
        "effect": step + 2,
        "tokens": (step + 1) * 128,
        "weights": quantize(np.array([share, 1 - share])),
        "counts": np.array([5, 3]),
        "loss": np.array([1.23456789, np.nan]),
        "loss_tokens": np.array([80, 0]),
    }
    recorder.decision(**{**values, **changed})


def write(path, *, lines=(), steps=3):
    """A record of some decisions, and lines appended as they are."""
    recorder = Recorder(path, HEADER)
    for step in range(steps):
        decide(recorder, step)
    recorder.close()
    with path.open("ab") as file:
        file.writelines(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    return path


# Lines


def test_what_was_written_is_read_back(path):
    recorder = Recorder(path, {**HEADER, "policy": {"name": "agent", "options": {"preference": 1 / 3}}})
    decide(recorder, 0, feedback={"web": 2.3456789})
    recorder.event("feedback", step=1, losses={"web": np.float64(0.5)})
    recorder.flush()
    assert path.read_bytes().count(b"\n") == 3, "flush leaves nothing in the queue"
    decide(recorder, 1)
    recorder.close()
    record = read_record(path)
    assert record.header == {
        "type": "header", "version": 1, **HEADER, "policy": {"name": "agent", "options": {"preference": 1 / 3}},
    }  # fmt: skip
    quarter = [WEIGHT_ONE // 4, WEIGHT_ONE // 4 * 3]
    assert record.decisions[0] == {
        "type": "decision", "step": 0, "effect": 2, "tokens": 128, "weights": quarter, "counts": [5, 3],
        "loss": [1.23457, None], "loss_tokens": [80, 0], "feedback": {"web": 2.34568},
    }  # fmt: skip
    assert "feedback" not in record.decisions[1]
    assert record.events == [{"type": "event", "event": "feedback", "step": 1, "losses": {"web": 0.5}}]
    assert (record.attempts, record.torn, record.steps) == (1, False, 2)
    assert b" " not in path.read_bytes(), "compact"


def test_a_decision_on_16_domains_takes_at_most_1_KB(path):
    names = [f"domain-number-{i:02d}" for i in range(16)]
    recorder = Recorder(path, {**HEADER, "domains": names, "weights": [WEIGHT_ONE, *[0] * 15]})
    weights = quantize(np.random.default_rng(0).uniform(0.8, 1.2, 16))
    recorder.decision(
        step=123_456,
        effect=123_458,
        tokens=123_456 * 524_288,
        weights=weights,
        counts=np.full(16, 1234),
        loss=np.full(16, 10.123456),
        loss_tokens=np.full(16, 1_263_616),
        feedback={"source": 2.345678, "target": 1.234567},
    )
    recorder.decision(
        step=123_456,
        effect=123_458,
        tokens=123_456 * 524_288,
        weights=weights,
        counts=np.full(16, 32),
        loss=np.full(16, 3.123456),
        loss_tokens=np.full(16, 32_768),
        feedback=dict.fromkeys((*names, "source", "target"), 2.345678),
    )
    recorder.close()
    assert max(map(len, path.read_bytes().splitlines(keepends=True))) <= 1024


def test_the_examples_in_the_docs_are_lines_of_a_record(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "record.md").read_text()
    lines = [line for block in text.split("```json\n")[1:] for line in block.split("```")[0].splitlines()]
    path = tmp_path / "record.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    record = read_record(path)
    assert (len(lines), record.steps, record.attempts) == (7, 400, 2)
    assert list(record.header) == list(write_by_mixer(tmp_path).header)
    for line in lines:
        assert json.dumps(json.loads(line), separators=(",", ":")) == line
        for key in json.loads(line):
            assert f"`{key}`" in text, f"{key} is explained"


def write_by_mixer(folder):
    data = tagged_domains(folder, {"web": [700]})
    with MixLoader(data, 4, 8) as loader, Mixer(loader, "natural", record=folder / "mixer.jsonl") as mixer:
        train(loader, mixer, 1)
    return read_record(folder / "mixer.jsonl")


# Damage


def test_a_record_torn_at_any_byte_of_its_last_line_is_read(path):
    whole = write(path).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        record = read_record(path)
        assert [d["step"] for d in record.decisions] == [0, 1]
        assert record.torn == (end > start)
        Recorder(path, HEADER, resume_step=2).close()
        record = read_record(path)
        assert ([d["step"] for d in record.decisions], record.torn, record.attempts) == ([0, 1], False, 2)


def good(**changed):
    line = {
        "type": "decision", "step": 3, "effect": 5, "tokens": 9, "weights": [WEIGHT_ONE, 0], "counts": [1, 2],
        "loss": [1.5, None], "loss_tokens": [1, 0],
    }  # fmt: skip
    return {**line, **changed}


@pytest.mark.parametrize(
    ("line", "offset", "message"),
    [
        (b"\n", 0, "Expecting value"),
        (b'{"type":"decision"\n', 18, "Expecting ',' delimiter"),
        (b'{"type":"event","event":"\xff","step":1}\n', 25, "invalid start byte"),
        (b"\0" * 40 + b"\n", 0, "Expecting value"),
        (b"[" * 5000 + b"\n", 0, "recursion"),
        (b'{"type":"event","event":"x","step":NaN}\n', 0, "NaN is not JSON"),
        (b'["decision"]\n', 0, "expected an object with type 'decision' or 'event'"),
        ({"type": "weights", "step": 1}, 0, "expected an object with type 'decision' or 'event'"),
        ({"type": "header", **HEADER}, 0, "expected an object with type 'decision' or 'event'"),
        (good(step=-1), 0, "its 'step' is -1; expected a count"),
        (good(effect=True), 0, "its 'effect' is True; expected a count"),
        (good(weights=[WEIGHT_ONE, 1]), 0, f"expected counts, one a domain, that sum to {WEIGHT_ONE}"),
        (good(weights=[WEIGHT_ONE + 1, -1]), 0, f"expected counts, one a domain, that sum to {WEIGHT_ONE}"),
        (good(weights=[WEIGHT_ONE]), 0, f"expected counts, one a domain, that sum to {WEIGHT_ONE}"),
        (good(counts=[1, 2.5]), 0, "its 'counts' is [1, 2.5]; expected counts, one a domain"),
        (good(loss=[1, "x"]), 0, "its 'loss' is [1, 'x']; expected numbers or null, one a domain"),
        ({"type": "event", "event": ["x"], "step": 1}, 0, "its 'event' is ['x']; expected a string"),
        ({"type": "event", "event": "x", "step": -2}, 0, "its 'step' is -2; expected a step, or -1"),
        ({"type": "event", "event": "weights", "step": 1}, 0, "its 'weights' is None"),
        ({"type": "event", "event": "resume", "step": 1}, 0, "its 'attempt' is None"),
    ],
)
def test_garbage_is_refused_with_its_line_and_byte(path, line, offset, message):
    start = len(write(path).read_bytes())
    write_again = path.read_bytes()
    line = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
    for rest in (b"", b'{"type":"event","event":"x","step":1}\n', b'{"torn'):
        path.write_bytes(write_again + line + rest)
        with pytest.raises(RecordError, match=f"is damaged in line 5, at byte {start + offset}: ") as refused:
            read_record(path)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no whole line; expected a header"),
        (b'{"type":"header","version":1', "has no whole line; expected a header"),
        (b"x\n", "in line 1, at byte 0"),
        (b'{"type":"decision"}\n', "expected an object with type 'header'"),
        (b'{"type":"header","version":2}\n', "its version is 2; this mixloader reads version 1, upgrade it"),
        (
            json.dumps({"type": "header", "version": 1, **HEADER, "domains": "web"}).encode() + b"\n",
            "'domains' is 'web'",
        ),
    ],
)
def test_a_bad_header_is_refused(tmp_path, content, message):
    path = tmp_path / "record.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_record(path)


def test_a_missing_record_is_named(path):
    with pytest.raises(RecordError, match=r"cannot read record .*record.jsonl: No such file"):
        read_record(path)


# Writers


def test_a_new_run_does_not_touch_an_existing_record(path):
    before = write(path).read_bytes()
    with pytest.raises(RecordError, match="exists already, and this is a new run; choose another path"):
        Recorder(path, HEADER)
    assert path.read_bytes() == before


def test_a_resumed_run_needs_its_own_record(path, tmp_path):
    with pytest.raises(RecordError, match="of the run to go on with does not exist"):
        Recorder(path, HEADER, resume_step=1)
    before = write(path).read_bytes()
    for key, value in (
        ("manifest", "beef"),
        ("seed", 4),
        ("seq_len", 32),
        ("global_batch", 16),
        ("domains", ["a", "b"]),
    ):
        with pytest.raises(RecordError, match=f"belongs to a run with {key} "):
            Recorder(path, {**HEADER, key: value}, resume_step=1)
    assert path.read_bytes() == before
    (tmp_path / "empty").touch()
    with pytest.raises(RecordError, match="has no whole line"):
        Recorder(tmp_path / "empty", HEADER, resume_step=1)


def test_two_writers_on_one_record_are_refused(path):
    recorder = Recorder(path, HEADER)
    with pytest.raises(RecordError, match="is being written by another process or Mixer"):
        Recorder(path, HEADER, resume_step=0)
    lock = f"import fcntl; fcntl.flock(open({str(path)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", lock], stderr=subprocess.PIPE, text=True, timeout=60)
    assert "BlockingIOError" in other.stderr
    recorder.close()
    Recorder(path, HEADER, resume_step=0).close()
    assert read_record(path).attempts == 2


def run(program):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-u", "-c", textwrap.dedent(program)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment)


def test_what_was_flushed_outlives_a_kill(path):
    program = f"""
        import numpy as np
        from mixloader.record import Recorder
        recorder = Recorder({str(path)!r}, {HEADER!r})
        for step in range(10**9):
            recorder.decision(step=step, effect=step + 2, tokens=step, weights=[1 << 30, 0], counts=[1, 2],
                              loss=[1.0, 2.0], loss_tokens=[1, 2])
            if step == 100:
                recorder.flush()
                print("flushed")
    """
    with run(program) as writer:
        assert writer.stdout.readline() == "flushed\n"
        writer.kill()
    steps = [decision["step"] for decision in read_record(path).decisions]
    assert steps == list(range(len(steps)))
    assert len(steps) > 100
    Recorder(path, HEADER, resume_step=50).close()
    assert len(read_record(path).decisions) == 50


def record_some(path):
    """Five flushed decisions. Returns the error that ended it."""
    try:
        recorder = Recorder(path, HEADER)
        try:
            for step in range(5):
                decide(recorder, step)
                recorder.flush()
        finally:
            recorder.close()
    except RecordError as error:
        return str(error)
    return None


@pytest.mark.parametrize("torn", [False, True])
def test_a_disk_that_fills_up_reaches_the_caller_and_leaves_a_readable_record(path, monkeypatch, torn):
    """The n-th write fails, for every n, with or without part of it on the disk: nothing hangs."""
    write_to_disk = os.write
    for n in range(7):
        target = path.with_name(f"{n}.jsonl")
        left = [write_to_disk] * n + [lambda file, content: write_to_disk(file, content[: len(content) // 2])] * torn

        def full(file, content, left=left):
            if left:
                return left.pop(0)(file, content)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("mixloader.record.os.write", full)
            error = record_some(target)
        assert (error is None) == (n == 6)
        assert error is None or "No space left on device" in error
        if n > 0:
            assert len(read_record(target).decisions) == min(5, n - 1)
            Recorder(target, HEADER, resume_step=5).close()
            assert not read_record(target).torn
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mixloader")]


def test_nothing_is_written_after_a_torn_line(path, monkeypatch):
    write_to_disk, lengths = os.write, iter([999, 999, 30, -1])

    def once(file, content):
        length = next(lengths, 999)
        if length < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_to_disk(file, content[:length])

    monkeypatch.setattr("mixloader.record.os.write", once)
    recorder = Recorder(path, HEADER)
    recorder._thread.submit(time.sleep, 0.1)  # the lines are queued before the first is written
    for step in range(5):
        decide(recorder, step)
    with pytest.raises(RecordError, match="Input/output error"):
        recorder.close()
    record = read_record(path)
    assert (len(record.decisions), record.torn) == (1, True)


def test_short_writes_go_on(path, monkeypatch):
    write_to_disk = os.write
    monkeypatch.setattr("mixloader.record.os.write", lambda file, content: write_to_disk(file, content[:7]))
    assert record_some(path) is None
    assert len(read_record(path).decisions) == 5


def test_an_error_in_the_background_is_raised_by_the_next_call_once(path, monkeypatch):
    def full(file, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder = Recorder(path, HEADER)
    monkeypatch.setattr("mixloader.record.os.write", full)
    decide(recorder, 0)
    deadline = time.monotonic() + 10
    with pytest.raises(RecordError, match="No space left on device; the lines since then are lost"):  # noqa: PT012
        while time.monotonic() < deadline:
            recorder.event("x", step=0)
    with pytest.raises(RecordError, match="No space left"):
        recorder.flush()
    recorder.close()


def test_a_failed_fsync_is_an_error(path, monkeypatch):
    def failing(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    recorder = Recorder(path, HEADER)
    monkeypatch.setattr("mixloader.record.os.fsync", failing)
    with pytest.raises(RecordError, match="Input/output error"):
        recorder.flush()
    recorder.close()


def test_a_record_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "record.jsonl"):
        with pytest.raises(RecordError, match=f"cannot write record {place}: (Is a directory|File exists)"):
            Recorder(place, HEADER)
    with pytest.raises(RecordError, match="cannot write record /dev/full: No space left on device"):
        Recorder("/dev/full", HEADER)


# Resumes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=5), st.integers(0, 3))
def test_a_canonical_record_is_that_of_the_run_without_its_lost_parts(tmp_path_factory, attempts, lag):
    """Each attempt resumes at a step that was reached, trains some steps and dies.

    A decision made after step s is written at the end of step s + lag, and its weights name the attempt.
    """
    path = tmp_path_factory.mktemp("run") / "record.jsonl"
    recorder, reached = Recorder(path, HEADER), 0
    decisions, events = {}, []
    for number, (resume, steps) in enumerate(attempts):
        if number:
            resume = min(resume, reached)
            recorder = Recorder(path, HEADER, resume_step=resume)
            # Decisions under way at the checkpoint are in the state; the others after it are forgotten.
            decisions = {s: share for s, share in decisions.items() if s < resume}
            events = [step for step in events if step < resume]
        else:
            resume = 0
        for step in range(resume, resume + steps):
            if step >= lag:
                decide(recorder, step - lag, share=0.5 + number / 100)
                decisions[step - lag] = 0.5 + number / 100
            recorder.event("x", step=step)
            events.append(step)
        reached = resume + steps
        recorder.close()
    record = read_record(path)
    assert [d["step"] for d in record.decisions] == sorted(decisions)
    assert [d["weights"][0] for d in record.decisions] == [
        quantize(np.array([decisions[s], 1 - decisions[s]]))[0] for s in sorted(decisions)
    ]
    assert [units for _, units in record.changes] == [d["weights"] for d in record.decisions]
    assert [event["step"] for event in record.events] == events
    assert record.attempts == len(attempts)


def test_units_at_knows_every_step(path):
    first, second, by_hand, third = ([WEIGHT_ONE - n, n] for n in (1, 2, 3, 4))
    lines = [
        good(step=0, effect=2, weights=first),
        good(step=1, effect=3, weights=second),
        {"type": "event", "event": "weights", "step": 3, "weights": by_hand},
        good(step=3, effect=5, weights=third),
    ]
    record = read_record(write(path, lines=lines, steps=0))
    expected = [HEADER["weights"], HEADER["weights"], first, by_hand, by_hand, third, third]
    assert [record.units_at(step).tolist() for step in range(7)] == expected
    late = dataclasses.replace(record, header={**HEADER, "step": 4})
    with pytest.raises(RecordError, match="begins at step 4; it does not know the weights of step 3"):
        late.units_at(3)


# Replay


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "record.jsonl"
    with (
        MixLoader(data, 4, 8, grad_accumulation_steps=2, seed=5) as loader,
        Mixer(loader, RandomWalk(), record=path) as mixer,
    ):
        batches = train(loader, mixer, 12, {(3, 1): ([1, 2, 3], None)})
    return path, batches


def test_a_replay_at_another_layout_draws_the_same_rows(data, recorded):
    path, batches = recorded
    rows = torch.cat([batch["input_ids"] for batch in batches])
    for batch_size, world_size in ((8, 1), (1, 1), (2, 2), (1, 8)):
        ranks = [replay(path, data, batch_size=batch_size, world_size=world_size, rank=r, num_workers=0, max_steps=12)
                 for r in range(world_size)]  # fmt: skip
        again = torch.cat([batch["input_ids"] for together in zip(*ranks, strict=True) for batch in together])
        assert torch.equal(again, rows)


def test_a_replay_of_a_killed_run_goes_as_far_as_the_record(data, recorded, tmp_path):
    path, batches = recorded
    lines = path.read_bytes().splitlines(keepends=True)
    short = tmp_path / "record.jsonl"
    short.write_bytes(b"".join(lines[:8]) + lines[8][:20])
    record = read_record(short)
    with replay(record, data, num_workers=0, max_steps=record.steps) as again:
        assert_same_batches(list(again), [batch for batch in batches if batch["step"] < record.steps])
    assert record.torn
    assert 5 <= record.steps <= 7


def test_a_replay_refuses_other_data_and_a_late_start(data, recorded, tmp_path):
    path, _ = recorded
    other = tagged_domains(tmp_path, {"web": [700, 300], "code": [400], "math": [91]})
    with pytest.raises(RecordError, match="the record belongs to data with fingerprint"):
        replay(path, other)
    late = tmp_path / "late.jsonl"
    with MixLoader(data, 4, 8) as loader:
        next(loader)
        with Mixer(loader, "natural", record=late) as mixer:
            train(loader, mixer, 3)
    with pytest.raises(RecordError, match="begins at step 1, where its Mixer was attached"):
        replay(late, data)
