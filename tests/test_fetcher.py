"""What the plan needs is here in time; what goes wrong reaches the readers that wait for it; nothing is left behind."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mixloader import remote
from mixloader.cache import ShardCache
from mixloader.errors import ShardError
from mixloader.fetcher import Fetcher
from mixloader.formats import Shard

SIZE = 10_000
CONTENTS = [np.random.default_rng(i).bytes(SIZE) for i in range(10)]


class FakeCore:
    """A stream whose row r needs shard order[r]; the part of _core.Streamer that a Fetcher uses, in plain Python."""

    def __init__(self, shards: int, order: list[int]):
        self.order, self.row = order, 0
        self.changed = threading.Condition()
        self.paths: list[str | None] = [None] * shards
        self.failures: list[str | None] = [None] * shards
        self.waiting: list[int] = []
        self.waits = 0  # reads that found their shard missing
        self.provided: list[int] = []

    def read(self) -> bytes:
        """The content of the shard that the next row needs."""
        with self.changed:
            shard = self.order[self.row]
            if self.paths[shard] is None:
                self.waits += 1
                self.failures[shard] = None
                self.waiting.append(shard)
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: self.paths[shard] or self.failures[shard], 20), "it hangs"
                self.waiting.remove(shard)
            path, failure = self.paths[shard], self.failures[shard]
            if path is None:
                raise ShardError(failure)
            content = Path(path).read_bytes()  # held, so that it is not withdrawn before it is open
            self.row += 1
        return content

    def wanted(self, timeout_ms: int) -> list[int]:
        with self.changed:
            self.changed.wait_for(lambda: self.waiting, timeout_ms / 1000)
            return sorted({i for i in self.waiting if not self.paths[i] and not self.failures[i]})

    def upcoming(self, limit: int) -> list[tuple[float, int]]:
        first: dict[int, float] = {}
        for ahead, shard in enumerate(self.order[self.row :]):
            first.setdefault(shard, float(ahead))
        return [(ahead, shard) for shard, ahead in first.items()][:limit]

    def provide(self, shard: int, path: str) -> None:
        with self.changed:
            self.paths[shard] = path
            self.provided.append(shard)
            self.changed.notify_all()

    def fail(self, shard: int, message: str) -> None:
        with self.changed:
            self.failures[shard] = message
            self.changed.notify_all()

    def withdraw(self, shard: int) -> None:
        with self.changed:
            self.paths[shard] = None

    def until_here(self, *shards: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: all(self.paths[i] for i in shards), 20), self.paths


@pytest.fixture
def shards(tmp_path) -> list[Shard]:
    """Ten raw shards on a file:// URL, each of 10,000 bytes, with their digests."""
    found = []
    for i, content in enumerate(CONTENTS):
        (tmp_path / f"{i}.bin").write_bytes(content)
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        found.append(Shard(f"file://{tmp_path}/{i}.bin", "nanogpt", "uint16", 0, SIZE // 2, SIZE, digest))
    return found


@pytest.fixture
def start(tmp_path, shards):
    """start(order, room) -> a core whose shards are fetched, with room for so many; all threads end with the test."""
    started = []

    def start(order: list[int], room: float = 10, workers: int = 2) -> FakeCore:
        cache = ShardCache(tmp_path / "cache", int(room * SIZE), workers)
        core = FakeCore(len(shards), order)
        started.append((Fetcher(core, shards, cache), cache))
        core.fetcher, core.cache = started[-1]
        return core

    before = threading.active_count()
    yield start
    for fetcher, cache in started:
        fetcher.close()
        cache.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("mixloader")] == []
    assert threading.active_count() <= before + 1  # fsspec has a thread of its own


def fetches(monkeypatch) -> list[str]:
    """The names of the shards that are fetched from here on, in order."""
    fetch, calls = remote.fetch, []

    def counted(url, file, **known):
        calls.append(Path(url).stem)
        return fetch(url, file, **known)

    monkeypatch.setattr(remote, "fetch", counted)
    return calls


def test_what_the_plan_needs_next_is_fetched_ahead_in_its_order(start, monkeypatch):
    calls = fetches(monkeypatch)
    core = start([3, 3, 1, 4, 1, 5, 9, 2, 6, 0, 7, 8], workers=1)
    core.until_here(*range(10))
    assert calls == [*"3145926078"]
    assert [core.read() for _ in range(12)] == [CONTENTS[i] for i in core.order]
    assert core.waits == 0


def test_more_data_than_room_streams_through_in_time(start, monkeypatch):
    calls = fetches(monkeypatch)
    order = [i for i in range(10) for _ in range(20)] * 3
    core = start(order, room=4)
    waits = []
    for shard in order:
        before = core.waits
        assert core.read() == CONTENTS[shard]
        waits.append(core.waits - before)
        time.sleep(0.005)
        assert len([path for path in core.cache.folder.iterdir() if path.suffix == ".bin"]) <= 4
    assert sum(waits) <= 10  # of the 30 times that a shard is needed, few are late even on a busy machine
    assert len(calls) <= 40  # each about once an epoch


def test_a_random_order_over_more_data_than_room_still_gives_every_row(start):
    order = np.random.default_rng(0).integers(0, 10, 150).tolist()
    core = start(order, room=3)
    assert [core.read() for _ in order] == [CONTENTS[i] for i in order]


def test_what_is_needed_soonest_is_not_withdrawn(start):
    core = start([0, 1, 2, 3, 4], room=3)
    core.until_here(0, 1, 2)
    time.sleep(0.4)
    assert sorted(core.provided) == [0, 1, 2]
    core.row = 2  # 0 and 1 are not needed any more
    core.until_here(2, 3, 4)


def test_what_a_reader_waits_for_comes_although_there_is_no_room(start, monkeypatch):
    core = start([0, 0, 0, 1, 2, 9], room=3)
    core.until_here(0, 1, 2)
    core.row = 5
    monkeypatch.setattr(core, "upcoming", lambda limit: [(0.0, 0), (1.0, 1), (2.0, 2)])  # as if 9 were of no domain
    assert core.read() == CONTENTS[9]


def test_a_run_begins_with_what_the_last_one_left(start, shards, monkeypatch):
    first = start(list(range(10)))
    first.until_here(*range(10))
    first.fetcher.close()
    calls = fetches(monkeypatch)
    core = start([9, 8, 7, 0, 1], room=5)
    core.until_here(9, 8, 7, 0, 1)
    assert calls == []


def test_a_shard_that_cannot_be_fetched_fails_its_reader_and_is_tried_again(start, shards, monkeypatch):
    path = Path(shards[1].path.removeprefix("file://"))
    path.unlink()
    core = start([0, 1, 2])
    assert core.read() == CONTENTS[0]
    for _ in range(2):
        with pytest.raises(ShardError, match=r"file://.*/1\.bin does not exist; check the path"):
            core.read()
    path.write_bytes(CONTENTS[2])
    with pytest.raises(ShardError, match=r"1\.bin has sha256 .*, but .* was expected"):
        core.read()
    path.write_bytes(CONTENTS[1])
    assert [core.read(), core.read()] == CONTENTS[1:3]


def test_other_shards_do_not_wait_for_one_that_fails(start, shards):
    Path(shards[1].path.removeprefix("file://")).unlink()
    core = start([0, 1, 2, 3])
    core.until_here(0, 2, 3)


def test_ready_shards_are_left_alone(tmp_path, shards):
    ready = Shard(str(tmp_path / "0.bin"), "nanogpt", "uint16", 0, SIZE // 2, SIZE)
    core = FakeCore(2, [0, 1])
    with_cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    fetcher = Fetcher(core, [ready, shards[1]], with_cache)
    core.until_here(1)
    time.sleep(0.1)
    assert core.provided == [1]
    fetcher.close()


@pytest.mark.parametrize("how", ["close", "garbage"])
def test_it_ends_soon_in_the_middle_of_a_fetch_and_leaves_nothing(tmp_path, shards, monkeypatch, how):
    begun = threading.Event()

    def stuck(url, file, *, cancel, **known):
        begun.set()
        assert cancel.wait(20)
        raise remote.Cancelled(url)

    monkeypatch.setattr(remote, "fetch", stuck)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    fetcher = Fetcher(FakeCore(10, list(range(10))), shards, cache)
    assert begun.wait(20)
    started = time.monotonic()
    if how == "close":
        fetcher.close()
        fetcher.close()
    del fetcher
    gc.collect()
    assert time.monotonic() - started < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mixloader")]
    assert [path.name for path in cache.folder.iterdir()] == ["locks"]


def test_two_ranks_of_one_machine_fetch_each_shard_once(start, monkeypatch):
    calls = fetches(monkeypatch)
    order = list(range(10))
    ranks = [start(order), start(order)]
    for rank in ranks:
        rank.until_here(*order)
    assert sorted(calls) == [*"0123456789"]
    assert [[rank.read() for _ in order] for rank in ranks] == [CONTENTS] * 2


@pytest.mark.filterwarnings("ignore:the cache .* exceeds its limit")
def test_two_ranks_with_room_for_less_than_both_hold_make_progress(start):
    orders = [[i % 10 for i in range(30)], [(i + 5) % 10 for i in range(30)]]
    ranks = [start(order, room=4) for order in orders]
    for row in range(30):
        for rank, order in zip(ranks, orders, strict=True):
            assert rank.read() == CONTENTS[order[row]]


def test_an_error_while_the_plan_is_looked_at_reaches_the_readers_and_ends_nothing(start, monkeypatch):
    released, fetch = threading.Event(), ShardCache.fetch

    def broken(*_, **__):
        raise OSError("the folder is gone")

    monkeypatch.setattr(ShardCache, "has", broken)
    monkeypatch.setattr(ShardCache, "fetch", lambda *args, **known: released.wait(20) and fetch(*args, **known))
    core = start([0])
    with pytest.raises(ShardError, match="the folder is gone"):
        core.read()
    monkeypatch.undo()
    released.set()
    assert core.read() == CONTENTS[0]
