"""The core's Streamer against the reference, whatever threads, timing, changes and faults there are."""

import contextlib
import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from corpora import tagged_domains

from mixloader import _core
from mixloader.errors import ShardError, StateError, WeightsError
from mixloader.mixture import WEIGHT_ONE
from mixloader.reference import ReferenceStream, StreamEnd, domain_key

SIZES = {"web": [700, 300], "code": [400], "math": [90]}
SEQ_LEN = 8
WEBS = [(700 - 1) // SEQ_LEN, (300 - 1) // SEQ_LEN]
WINDOWS = [WEBS, [(400 - 1) // SEQ_LEN], [(90 - 1) // SEQ_LEN]]
EQUAL = [WEIGHT_ONE // 4, WEIGHT_ONE // 4, WEIGHT_ONE // 2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The shards, numbered through all domains."""
    data = tagged_domains(tmp_path_factory.mktemp("shards"), SIZES)
    return [str(path) for shards in data.values() for path in shards]


class Stream:
    """A _core.Streamer with its buffers. fetched: shards that are not here to begin with."""

    def __init__(self, paths, *, units=EQUAL, depth=4, fetched=(), threads=1, batch_size=4, **options):
        numbers = iter(range(len(paths)))
        domains = []
        for name, sizes in SIZES.items():
            shards = []
            for size in sizes:
                number = next(numbers)
                path = "" if number in fetched else paths[number]
                windows = (size - 1) // SEQ_LEN
                place = {"name": paths[number], "path": path, "offset": 1024}
                shards.append({**place, "tokens": size, "width": 4, "windows": windows})
            domains.append((domain_key(name), shards))
        options = {"micro_batches": 1, "world_size": 1, "rank": 0, "seed": 5, **options}
        self.core = _core.Streamer(
            domains=domains, seq_len=SEQ_LEN, vocab_size=0, batch_size=batch_size, threads=threads,
            units=np.array(units), **options,
        )  # fmt: skip
        self.core.supply(depth)

    def submit(self):
        self.core.supply(self.core.queued() + 1)

    def next(self):
        """(what next() gave, [(domain, position of the first token)]), or None at the end."""
        drawn = self.core.next()
        if drawn is None:
            return None
        self.tensors = [capsule if capsule is None else torch.from_dlpack(capsule).numpy() for capsule in drawn[6]]
        inputs, targets, domains, _, _ = self.tensors
        assert np.array_equal(targets, inputs + 1)
        assert np.array_equal(inputs[:, 0] >> 20, domains)
        rows = [(int(first) >> 20, int(first) & 0xFFFFF) for first in inputs[:, 0]]
        self.submit()
        return drawn, rows

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.core.close()


def reference(weights, rows=4, **options):
    return ReferenceStream(5, list(SIZES), WINDOWS, rows, weights, **options)


def position(row):
    """Where the window of a reference's row begins, in the tokens of its domain."""
    domain, window = row[0], row[1]
    if domain == 0 and window >= WEBS[0]:
        return domain, 700 + (window - WEBS[0]) * SEQ_LEN
    return domain, window * SEQ_LEN


def random_units(rng):
    """Zeros now and then."""
    cuts = sorted(rng.choice([0, rng.randrange(WEIGHT_ONE), WEIGHT_ONE]) for _ in range(2))
    return [cuts[0], cuts[1] - cuts[0], WEIGHT_ONE - cuts[1]]


class Model:
    """What the streamer should do next, by the reference: (step, micro-batch, version, rows)."""

    def __init__(self, micro_batches):
        self.micro_batches, self.version, self.micro_batch = micro_batches, 0, 0
        self.versions = {0: 0}
        self.stream = reference({0: EQUAL}, rows=4 * micro_batches)

    @property
    def open_step(self):
        return self.stream.step

    def set_weights(self, units, step):
        step = self.open_step if step is None else step
        self.version += 1
        self.stream.weights[step], self.versions[step] = units, self.version
        return step

    def next(self):
        if self.micro_batch == 0:
            step = self.stream.step
            self.in_force = self.versions[max(s for s in self.versions if s <= step)]
            self.rows = [position(row) for row in self.stream.next_step()]
        m = self.micro_batch
        self.micro_batch = (m + 1) % self.micro_batches
        return self.stream.step - 1, m, self.in_force, self.rows[4 * m : 4 * m + 4]

    def skip(self, n):
        for _ in range(n):
            self.stream.next_step()
        return self.stream.step

    def save(self):
        s = self.stream
        return (
            list(s.cursors), list(s.residuals), s.step, dict(s.weights), dict(self.versions), self.version,
            self.micro_batch, getattr(self, "rows", None), getattr(self, "in_force", None),
        )  # fmt: skip

    def load(self, saved):
        s = self.stream
        cursors, residuals, s.step, weights, versions, self.version, self.micro_batch, self.rows, self.in_force = saved
        s.cursors, s.residuals, s.weights, self.versions = list(cursors), list(residuals), dict(weights), dict(versions)


@pytest.mark.parametrize("threads", [0, 1, 5, None])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_calls_gives_the_stream_of_the_reference(paths, threads, seed):
    rng = random.Random(seed)
    model = Model(micro_batches := rng.choice([1, 3]))
    with Stream(paths, threads=threads, depth=rng.choice([1, 4, 7]), micro_batches=micro_batches) as stream:
        core, saved = stream.core, None
        for _ in range(250):
            action = rng.choice(["next"] * 5 + ["set", "set_later", "skip", "save", "load", "peek"])
            if action == "next":
                (step, micro_batch, version, *_), rows = stream.next()
                assert (step, micro_batch, version, rows) == model.next()
            elif action in ("set", "set_later"):
                units = random_units(rng)
                step = model.open_step + rng.randrange(4) if action == "set_later" else None
                assert core.set_weights(np.array(units), step) == model.set_weights(units, step)
            elif action == "skip" and model.micro_batch == 0:
                assert core.skip(n := rng.randrange(4)) == model.skip(n)
            elif action == "save":
                saved = json.loads(json.dumps(core.state())), model.save()
            elif action == "load" and saved:
                core.load_state(saved[0])
                model.load(saved[1])
            elif action == "peek":
                core.peek()
            assert core.step() == model.open_step


@pytest.mark.parametrize("threads", [1, 6])
def test_weights_that_change_from_another_thread_give_the_stream_of_the_weights_reported(paths, threads):
    changes = [EQUAL]
    stop = threading.Event()
    with Stream(paths, threads=threads) as stream:

        def change():
            rng = random.Random(1)
            while not stop.is_set():
                changes.append(random_units(rng))
                stream.core.set_weights(np.array(changes[-1]))

        changer = threading.Thread(target=change)
        changer.start()
        drawn = [stream.next() for _ in range(400)]
        stop.set()
        changer.join()
    expected = reference({step: changes[version] for (step, _, version, *_), _ in drawn})
    assert [rows for _, rows in drawn] == [[position(row) for row in expected.next_step()] for _ in drawn]


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_ends_at_the_same_step_on_every_rank_and_new_weights_revive_it(paths, threads, rank):
    options = {"limits": [1000, 20, 30], "stop_at_limit": True}
    with Stream(paths, threads=threads, batch_size=2, world_size=2, rank=rank, **options) as stream:
        expected = reference({0: EQUAL}, limits=options["limits"], stop_at_limit=True)
        steps = 0
        while stream.next():
            expected.next_step()
            steps += 1
        with pytest.raises(StreamEnd):
            expected.next_step()
        assert stream.core.next() is None, "the end stays the end"
        assert stream.core.peek() is None
        assert stream.core.state()["cursors"] == expected.cursors
        assert stream.core.step() == steps
        assert stream.core.skip(3) == steps
        assert stream.core.set_weights(np.array([WEIGHT_ONE, 0, 0])) == steps
        expected.weights[steps] = [WEIGHT_ONE, 0, 0]
        for _ in range(5):
            rows = [position(row) for row in expected.next_step()]
            assert stream.next()[1] == rows[2 * rank : 2 * rank + 2]


def test_skip_is_refused_inside_a_step(paths):
    with Stream(paths, micro_batches=2) as stream:
        stream.next()
        with pytest.raises(StateError, match=r"skip\(\) inside step 0, of which 1 of 2 micro-batches were drawn"):
            stream.core.skip(1)
        assert stream.next()[0][:2] == (0, 1)
        assert stream.core.skip(2000) == 2001


def test_a_fill_has_another_number_when_the_weights_refilled_its_buffers(paths):
    with Stream(paths) as stream:
        seen = peeked(stream)
        assert peeked(stream) == seen
        assert stream.next()[0][4] == seen
        before = peeked(stream)
        stream.core.set_weights(np.array([0, WEIGHT_ONE, 0]))
        drawn, rows = stream.next()
        assert drawn[4] not in (seen, before)
        assert {domain for domain, _ in rows} == {1}


def peeked(stream):
    while (ready := stream.core.peek()) is None:
        time.sleep(0.001)
    return ready[0]


@contextlib.contextmanager
def fetcher(core, answer):
    """A thread that answers wanted() until the streamer is closed."""

    def fetch():
        with contextlib.suppress(RuntimeError):  # closed
            while True:
                for shard in core.wanted(1000):
                    answer(shard)

    thread = threading.Thread(target=fetch)
    thread.start()
    try:
        yield
    finally:
        core.close()
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.mark.parametrize("threads", [0, 1, 3, None])
def test_shards_are_waited_for_and_come_and_go(paths, threads):
    rng = random.Random(0)
    expected = reference({0: EQUAL})
    with Stream(paths, threads=threads, fetched={0, 1, 3}) as stream:

        def answer(shard):
            time.sleep(0.002 * rng.random())
            stream.core.provide(shard, paths[shard])

        with fetcher(stream.core, answer):
            for i in range(60):
                assert stream.next()[1] == [position(row) for row in expected.next_step()]
                if i % 5 == 0:
                    stream.core.withdraw(rng.choice([0, 1, 3]))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_shard_that_cannot_be_fetched_raises_at_its_batch_and_is_asked_for_again(paths, threads):
    failures = iter(["the store says 503", "the store says 404"])
    expected = reference({0: [0, WEIGHT_ONE, 0], 2: [0, 0, WEIGHT_ONE]})
    with Stream(paths, units=[0, WEIGHT_ONE, 0], threads=threads, fetched={3}) as stream:
        stream.core.set_weights(np.array([0, 0, WEIGHT_ONE]), 2)

        def answer(shard):
            assert shard == 3
            failure = next(failures, None)
            stream.core.provide(shard, paths[shard]) if failure is None else stream.core.fail(shard, failure)

        with fetcher(stream.core, answer):
            for _ in range(2):
                assert stream.next()[1] == [position(row) for row in expected.next_step()]
            errors = []
            while True:
                try:
                    drawn, rows = stream.next()
                    break
                except ShardError as error:
                    errors.append(str(error))
            assert (drawn[0], rows) == (2, [position(row) for row in expected.next_step()])
            # Threads that read ahead ask for it, too: one failure may belong to a later batch.
            assert errors
            assert set(errors) <= {"the store says 503", "the store says 404"}
            assert next(failures, None) is None


def test_threads_share_one_batch(paths):
    """All shards that a batch needs are waited for at once, though there are buffers for one batch only."""
    with Stream(paths, threads=4, depth=1, batch_size=16, fetched={0, 1, 2, 3}) as stream:
        deadline = time.monotonic() + 30
        wanted = set()
        while len(wanted) < 3 and time.monotonic() < deadline:
            wanted = set(stream.core.wanted(100)) | wanted
        assert len(wanted) >= 3


def test_threads_are_added_while_the_consumer_waits_for_slow_storage(paths):
    """From one to as many as there are rows to read at once, which is four here."""
    expected = reference({0: EQUAL})
    with Stream(paths, threads=None, depth=1, fetched={0, 1, 2, 3}) as stream:

        def answer(shard):
            time.sleep(0.005)
            stream.core.provide(shard, paths[shard])

        with fetcher(stream.core, answer):
            before = len(os.listdir("/proc/self/task"))
            for _ in range(12):
                assert stream.next()[1] == [position(row) for row in expected.next_step()]
                for shard in range(4):
                    stream.core.withdraw(shard)
            assert len(os.listdir("/proc/self/task")) == before + 3


def test_next_says_whether_it_had_to_wait(paths):
    with Stream(paths) as stream:
        peeked(stream)
        assert stream.next()[0][3] is False
    with Stream(paths, threads=0) as stream:
        assert stream.next()[0][3] is True


def test_upcoming_names_the_shards_to_fetch_soonest_first(paths):
    half = WEIGHT_ONE // 2
    with Stream(paths, units=[half, half, 0], threads=0, fetched={0, 2, 3}, shuffle=False) as stream:
        upcoming = stream.core.upcoming(10)
        assert [shard for _, shard in upcoming] == [0, 2, 3]
        assert [rows for rows, _ in upcoming][:2] == [0, 0]
        assert upcoming[2][0] == float("inf")
        stream.core.set_weights(np.array([0, 0, WEIGHT_ONE]))
        assert stream.core.upcoming(1) == [(0.0, 3)]


def test_only_shards_that_have_to_be_fetched_can_be_provided(paths):
    with Stream(paths, fetched={1}) as stream:
        for call in (lambda n: stream.core.provide(n, "x"), lambda n: stream.core.fail(n, "x"), stream.core.withdraw):
            for shard in (0, 99):
                with pytest.raises(ValueError, match=f"shard {shard} is none that has to be fetched"):
                    call(shard)


@pytest.mark.parametrize("threads", [0, 2])
def test_close_wakes_whoever_waits(paths, threads):
    stream = Stream(paths, threads=threads, fetched={0, 1, 2, 3})
    raised = []

    def wait(call):
        try:
            call()
        except (RuntimeError, ShardError) as error:
            raised.append(str(error))

    waiters = [
        threading.Thread(target=wait, args=(call,)) for call in (stream.core.next, lambda: stream.core.wanted(600_000))
    ]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.1)
    stream.core.close()
    for waiter in waiters:
        waiter.join(timeout=30)
        assert not waiter.is_alive()
    assert "the loader is closed" in raised


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("threads", [0, 2])
def test_ctrl_c_ends_a_wait_for_a_shard(paths, threads):
    with Stream(paths, threads=threads, fetched={0, 1, 2, 3}) as stream:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            stream.core.next()
        timer.join()


def test_memory_comes_back_when_the_last_view_of_a_batch_dies(paths):
    with Stream(paths, threads=0, depth=1) as stream:

        def address(stream=stream):
            stream.next()
            assert all(array.ctypes.data % 64 == 0 for array in stream.tensors if array is not None)
            return stream.tensors[0].ctypes.data

        first = address()
        view = stream.tensors[1][1:, 2:]
        for _ in range(40):  # handed over, and not taken
            stream.core.next()
            stream.submit()
        assert first not in {address() for _ in range(9)}, "a view is still there"
        del view
        assert len({address() for _ in range(9)}) <= 3
        kept = stream.tensors
        kept[0][:] = 7
    del stream
    assert (kept[0] == 7).all()


def test_a_batch_may_be_kept_for_ever(paths):
    with Stream(paths, threads=2) as stream:
        kept = []
        for _ in range(50):
            stream.next()
            kept.append((stream.tensors[0], stream.tensors[0].copy()))
    assert all(np.array_equal(held, copy) for held, copy in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.zeros((4, 9), dtype=np.int64)}, "no contiguous array of 256 bytes"),
        ({0: np.zeros((8, 4), dtype=np.int64).T}, "no contiguous array of 256 bytes"),
        ({0: None}, "a buffer that the format needs is no array"),
        ({2: np.zeros(8, dtype=np.int32)}, "no array of its type"),
        ({3: np.zeros((4, 8), dtype=np.int64)}, "the format does not use"),
    ],
)
def test_buffers_of_the_wrong_shape_are_refused(paths, change, message):
    with Stream(paths, depth=0) as stream:
        arrays = dict(enumerate([np.zeros((4, 8), np.int64), np.zeros((4, 8), np.int64), np.zeros(4, np.int64)]))
        with pytest.raises(ValueError, match=message):
            stream.core.submit(*{**arrays, **change}.values())


def test_weights_of_a_step_that_has_begun_are_refused(paths):
    with Stream(paths, micro_batches=2) as stream:
        stream.next()
        with pytest.raises(WeightsError, match="step 0 has begun; weights can change from step 1 on"):
            stream.core.set_weights(np.array(EQUAL), 0)
