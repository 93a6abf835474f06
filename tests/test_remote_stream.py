"""The stream over remote and compressed shards is that over the same shards at hand, batch for batch."""

from __future__ import annotations

import contextlib
import gc
import gzip
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import tagged_domains
from s3 import fresh, s3_server

from mixloader import MixLoader, _core
from mixloader.cache import ShardCache
from mixloader.errors import ManifestError, ShardError
from mixloader.fetcher import Fetcher
from mixloader.manifest import Manifest
from mixloader.mixture import quantize
from mixloader.reference import domain_key

SEQ_LEN, BATCH = 32, 8
SIZES = {"web": [3000, 4000, 5000, 3000], "code": [2000, 6000], "maths": [4000, 4000, 100]}
WEIGHTS = quantize(np.array([0.5, 0.3, 0.2]))


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    return fresh(server, monkeypatch, part=4096)  # several requests a shard


@pytest.fixture
def data(tmp_path) -> dict[str, list[Path]]:
    return tagged_domains(tmp_path / "data", SIZES)


def upload(s3, data: dict[str, list[Path]], folder: str) -> dict[str, list[str]]:
    """The same shards elsewhere: raw, compressed with zstd and with gzip on S3, and one that stays at hand."""
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed (pip install 'mixloader[remote]')")
    stores = [
        ("", lambda content: content),
        (".zst", zstandard.ZstdCompressor().compress),
        (".gz", gzip.compress),
    ]
    result: dict[str, list[str]] = {}
    for name, paths in data.items():
        result[name] = []
        for i, path in enumerate(paths):
            suffix, store = stores[i % 3]
            result[name].append(s3.put(f"{folder}/{name}_{i}.bin{suffix}", store(path.read_bytes())))
    result["code"][0] = str(data["code"][0])
    return result


class Stream:
    """A core over a manifest, with a Fetcher if there is a cache."""

    def __init__(self, data, cache: ShardCache | None = None, *, threads: int = 2, shuffle_shards: int = 0):
        manifest = Manifest.open(data)
        self.core = _core.Streamer(
            domains=[
                (
                    domain_key(d.name),
                    [{**shard.for_core(), "windows": (shard.tokens - 1) // SEQ_LEN} for shard in d.shards],
                )
                for d in manifest.domains
            ],
            seq_len=SEQ_LEN, vocab_size=0, seed=1, batch_size=BATCH, micro_batches=1, world_size=1, rank=0,
            units=WEIGHTS, threads=threads, shuffle_shards=shuffle_shards,
        )  # fmt: skip
        self.cache = cache
        shards = [shard for domain in manifest.domains for shard in domain.shards]
        self.fetcher = None if cache is None else Fetcher(self.core, shards, cache)
        self.buffers: list[np.ndarray] = []

    def batches(self, count: int) -> np.ndarray:
        """int64 [count, B, T]: the next inputs."""
        return np.stack([self.next() for _ in range(count)])

    def next(self) -> np.ndarray:
        while len(self.buffers) < 4:
            inputs = np.empty((BATCH, SEQ_LEN), dtype=np.int64)
            self.core.submit(inputs, np.empty_like(inputs), np.empty(BATCH, dtype=np.int64))
            self.buffers.append(inputs)
        assert self.core.next(120) is not None
        return self.buffers.pop(0)

    def close(self) -> None:
        if self.fetcher is not None and self.cache is not None:
            self.fetcher.close()
            self.cache.close()
        self.core.close()


@pytest.fixture
def open_stream(tmp_path):
    streams = []

    def open_stream(data, limit: int | None = None, **options) -> Stream:
        cache = None if limit is None else ShardCache(tmp_path / "cache", limit, 2)
        streams.append(Stream(data, cache, **options))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mixloader")]


@pytest.mark.parametrize(("threads", "shuffle_shards"), [(0, 0), (3, 0), (1, 1)])
def test_remote_and_compressed_shards_give_the_same_stream(s3, data, open_stream, threads, shuffle_shards):
    elsewhere = upload(s3, data, f"same_{threads}_{shuffle_shards}")
    s3.faults[:] = ["none", "error", "cut", "none", "truncate", "busy", "delay"] * 2
    expected = open_stream(data, shuffle_shards=shuffle_shards).batches(120)
    stream = open_stream(elsewhere, 1 << 20, threads=threads, shuffle_shards=shuffle_shards)
    np.testing.assert_array_equal(stream.batches(120), expected)


def test_a_cache_smaller_than_the_data_gives_the_same_stream(s3, data, open_stream):
    """120 KB of shards, room for 60: what was read is removed, and fetched again in the next epoch."""
    elsewhere = upload(s3, data, "small")
    expected = open_stream(data, shuffle_shards=1).batches(140)
    stream = open_stream(elsewhere, 60_000, threads=2, shuffle_shards=1)
    for i in range(140):
        np.testing.assert_array_equal(stream.next(), expected[i])
        # One look counts a copy that goes and the one that comes for it; of several, the least is at most the truth.
        assert min(held_bytes(stream.cache.folder) for _ in range(3)) <= 60_000


def held_bytes(folder):
    """Of the copies in a cache, some of which may go meanwhile."""
    held = 0
    for path in list(folder.glob("[!.]*.bin*")):
        with contextlib.suppress(FileNotFoundError):
            held += path.stat().st_size
    return held


def test_a_change_of_weights_while_shards_are_fetched(s3, data, open_stream):
    elsewhere = upload(s3, data, "weights")
    streams = [open_stream(data), open_stream(elsewhere, 1 << 20)]
    for step in range(60):
        units = quantize(np.random.default_rng(step).dirichlet([1, 1, 1]))
        batches = []
        for stream in streams:
            stream.core.set_weights(units)
            batches.append(stream.next())
        np.testing.assert_array_equal(*batches)


def test_a_missing_object_is_an_error_at_its_batch_and_nothing_is_lost(s3, data, open_stream):
    elsewhere = upload(s3, data, "missing")
    expected = open_stream(data).batches(100)
    content = data["web"][3].read_bytes()
    manifest = Manifest.open(elsewhere)
    s3.put("missing/web_3.bin", content[:-1])  # replaced by a shorter one since the manifest was written
    stream = open_stream(manifest, 1 << 20)
    read, errors = [], []
    while len(read) < 100:
        try:
            read.append(stream.next())
        except ShardError as error:
            errors.append(str(error))
            if len(errors) == 2:
                s3.put("missing/web_3.bin", content)
    assert all("s3://data/missing/web_3.bin has 13023 bytes, but 13024 were expected" in error for error in errors)
    assert len(errors) >= 2
    np.testing.assert_array_equal(np.stack(read), expected)


def test_closing_does_not_wait_for_a_server_that_hangs(s3, data, open_stream):
    elsewhere = upload(s3, data, "hang")
    s3.faults[:] = ["none"] * 30
    stream = open_stream(elsewhere, 1 << 20)
    s3.faults[:] = ["stall"] * 100
    time.sleep(0.3)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 2
    s3.faults.clear()


def test_a_shard_withdrawn_and_removed_at_any_moment_is_no_error(tmp_path, data):
    """What a full cache does, as fast as it can: provide a copy, withdraw it, remove it, provide another."""
    manifest = Manifest.open({"web": data["web"][0]})
    (shard,) = manifest.domains[0].shards
    core = _core.Streamer(
        domains=[(1, [{**shard.for_core(), "path": "", "windows": (shard.tokens - 1) // SEQ_LEN}])],
        seq_len=SEQ_LEN, vocab_size=0, seed=1, batch_size=BATCH, micro_batches=1, world_size=1, rank=0,
        units=quantize(np.array([1.0])), threads=4,
    )  # fmt: skip
    over = threading.Event()

    def provide() -> None:
        content, copies = data["web"][0].read_bytes(), 0
        while not over.is_set():
            copy = tmp_path / f"copy_{copies}.bin"
            copies += 1
            copy.write_bytes(content)
            core.provide(0, str(copy))
            core.withdraw(0)
            copy.unlink()

    thread = threading.Thread(target=provide)
    thread.start()
    try:
        for _ in range(300):
            inputs = np.empty((BATCH, SEQ_LEN), dtype=np.int64)
            core.submit(inputs, np.empty_like(inputs), np.empty(BATCH, dtype=np.int64))
            assert core.next() is not None
            np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(SEQ_LEN))
    finally:
        over.set()
        thread.join()
        core.close()


def test_the_url_of_a_folder_stands_for_its_shards(tmp_path, data):
    with pytest.raises(ManifestError, match=r"folder file://.*/ of domain 'web' holds no token shards"):
        Manifest.open({"web": f"file://{tmp_path}/data/"})
    (tmp_path / "data" / "web" / "notes.txt").write_text("no shard")
    found = Manifest.open({"web": f"file://{tmp_path}/data/web/"}).domain("web").shards
    assert [shard.path for shard in found] == [f"file://{path}" for path in data["web"]]


def locks_held(folder: Path) -> int:
    """Descriptors of this process in a cache folder."""
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(folder)) for fd in os.listdir("/proc/self/fd"))


def test_a_loader_that_is_dropped_or_cannot_be_opened_lets_go_of_its_cache(tmp_path, data, monkeypatch):
    url = f"file://{data['web'][0]}"
    loader = MixLoader({"web": url}, 4, 16, cache_dir=tmp_path / "cache")
    next(loader)
    assert locks_held(tmp_path / "cache") > 0
    del loader
    gc.collect()
    assert locks_held(tmp_path / "cache") == 0
    monkeypatch.setattr("mixloader.engine.Fetcher", None)
    with pytest.raises(TypeError) as failure:
        MixLoader({"web": url}, 4, 16, cache_dir=tmp_path / "cache")
    assert locks_held(tmp_path / "cache") == 0
    assert failure.tb is not None, "which would have kept it open"
