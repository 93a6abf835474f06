"""The shared cache of fetched shards: whole files, within its limit, whatever other processes do or how they die."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from s3 import s3_server

from mixloader import cache as cache_module
from mixloader import remote
from mixloader.cache import NotNowError, ShardCache
from mixloader.errors import ConfigError, ShardError

KB = 1 << 10
CONTENTS = [np.random.default_rng(i).bytes(64 * KB) for i in range(8)]


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """URLs of eight files of 64 KB, and a scheme that is fetched."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for i, content in enumerate(CONTENTS):
        (folder / f"shard_{i}.bin").write_bytes(content)
    return [f"file://{folder}/shard_{i}.bin" for i in range(8)]


@pytest.fixture
def make(tmp_path):
    made = []

    def make(shards: int = 8, **options) -> ShardCache:
        made.append(ShardCache(tmp_path / "cache", shards * 64 * KB, **options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def entries(cache: ShardCache) -> list[str]:
    """The last characters of the names in the folder, but for the locks and sums."""
    return sorted(name[-11:] for name in os.listdir(cache.folder) if name != "locks" and name[0] != ".")


def python(program: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def test_a_fetched_file_is_whole_and_fetched_once(make, sources, monkeypatch):
    cache = make()
    path = cache.fetch(sources[0], bytes=64 * KB)
    assert Path(path).read_bytes() == CONTENTS[0]
    monkeypatch.setattr(remote, "fetch", None)
    assert cache.fetch(sources[0], bytes=64 * KB) == path
    assert make().fetch(sources[0], bytes=64 * KB) == path
    assert cache.has(sources[0], bytes=64 * KB)
    assert not cache.has(sources[1], bytes=64 * KB)


def test_a_file_that_is_not_the_expected_one_leaves_nothing(make, sources):
    cache = make()
    with pytest.raises(ShardError, match="restore it"):
        cache.fetch(sources[0], digest="sha256:00")
    with pytest.raises(ShardError, match="does not exist"):
        cache.fetch(sources[0] + "x", bytes=1)
    assert entries(cache) == []
    assert Path(cache.fetch(sources[0])).read_bytes() == CONTENTS[0]


def test_a_copy_that_was_cut_is_fetched_anew(make, sources):
    cache = make()
    path = cache.fetch(sources[0], bytes=64 * KB)
    cache.release(path)
    os.truncate(path, 100)
    assert Path(cache.fetch(sources[0], bytes=64 * KB)).read_bytes() == CONTENTS[0]


def test_a_file_that_was_replaced_by_one_of_its_size_is_fetched_anew(make, sources):
    old = make()
    assert Path(old.fetch(sources[0], bytes=64 * KB)).read_bytes() == CONTENTS[0]
    Path(sources[0][7:]).write_bytes(CONTENTS[1])
    new = make()
    assert new.has(sources[0], bytes=64 * KB)  # as far as it knows
    assert Path(new.fetch(sources[0], bytes=64 * KB)).read_bytes() == CONTENTS[1]
    new.fetch(sources[2])
    os.utime(sources[3][7:], (0, 0))
    assert not new.has(sources[3])
    old._versions[sources[3]] = new._versions[sources[2]]
    with pytest.raises(
        ShardError, match=r"shard_3\.bin was replaced while it was in use: it had 65536 bytes, mtime .*"
    ):
        old.fetch(sources[3])


@pytest.mark.parametrize("digest", [None, "sha256:" + hashlib.sha256(CONTENTS[0]).hexdigest()])
def test_a_copy_that_was_damaged_is_fetched_anew(make, sources, monkeypatch, digest):
    for _ in range(2):
        cache = make()
        path = Path(cache.fetch(sources[0], bytes=64 * KB, digest=digest))
        assert path.read_bytes() == CONTENTS[0]
        cache.close()
        path.write_bytes(CONTENTS[0][:-1] + bytes([CONTENTS[0][-1] ^ 1]))
    user = make()
    user.fetch(sources[0], bytes=64 * KB, digest=digest)
    path.write_bytes(CONTENTS[1])
    monkeypatch.setattr(cache_module, "_DAMAGED_S", 0.1)
    with pytest.raises(ShardError, match=r", the cached copy of .*, is damaged, and another process uses it; remove"):
        make().fetch(sources[0], bytes=64 * KB, digest=digest)
    user.close()
    (path.parent / f".{path.name}.sum").unlink()
    assert Path(make().fetch(sources[0], bytes=64 * KB, digest=digest)).read_bytes() == CONTENTS[0]


def test_a_copy_is_compared_once_and_its_sum_goes_with_it(make, sources, monkeypatch):
    first, cache, summed = make(), make(), []
    path = Path(first.fetch(sources[0]))
    digest = path.with_name(f".{path.name}.sum")
    monkeypatch.setattr(cache_module, "_sha256", lambda file: summed.append(file) or digest.read_text())
    for _ in range(3):
        cache.fetch(sources[0])
        cache.release(str(path))
    assert len(summed) == 1
    monkeypatch.undo()
    path.unlink()
    make()  # in use by the first cache
    assert digest.exists()
    first.close()
    make()
    assert not digest.exists()


def test_what_was_used_longest_ago_makes_room(make, sources):
    cache = make(shards=3)
    paths = [cache.fetch(url) for url in sources[:3]]
    for i in (1, 0, 2):
        cache.release(paths[i])
    cache.release(cache.fetch(sources[1]))  # used again: now 0 was used longest ago
    cache.fetch(sources[3])
    assert entries(cache) == ["shard_1.bin", "shard_2.bin", "shard_3.bin"]
    cache.fetch(sources[4])
    assert entries(cache) == ["shard_1.bin", "shard_3.bin", "shard_4.bin"]


def test_what_is_in_use_stays_also_for_another_process(make, sources):
    mine, other = make(shards=2), make(shards=2)  # two caches share as two processes do
    first = mine.fetch(sources[0])
    assert other.fetch(sources[0]) == first
    mine.release(first)
    mine.fetch(sources[1])
    for cache in (mine, other):
        with pytest.raises(NotNowError) as caught:
            cache.fetch(sources[2], ahead=True)
        assert caught.value.full
    assert entries(mine) == ["shard_0.bin", "shard_1.bin"]
    with pytest.warns(UserWarning, match=r"exceeds its limit by 65536 bytes"):  # a reader waits: the limit yields
        mine.fetch(sources[2])
    other.release(first)
    with pytest.warns(UserWarning, match=r"exceeds its limit by 65536 bytes"):
        mine.fetch(sources[3])
    assert entries(mine) == ["shard_1.bin", "shard_2.bin", "shard_3.bin"]


def test_a_file_larger_than_the_limit_is_refused(make, sources):
    with pytest.raises(ShardError, match=r"65536 bytes, more than the 32768 of the cache .*raise its limit"):
        make(shards=0.5).fetch(sources[0])


def test_options_and_folder_are_checked(tmp_path, monkeypatch):
    for options in ({"limit_bytes": 0}, {"workers": 0}, {"limit_bytes": "1GB"}, {"limit_bytes": 1.5}):
        with pytest.raises(ConfigError, match="at least 1"):
            ShardCache(tmp_path, **options)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot use .*/file/cache as shard cache: .*; give another folder"):
        ShardCache(tmp_path / "file" / "cache")
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "elsewhere"))
    assert ShardCache().folder == tmp_path / "elsewhere" / "shards"


def test_a_full_disk_is_said_and_leaves_nothing(make, sources, monkeypatch):
    def fetch(url, file, **known):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "fetch", fetch)
    cache = make()
    with pytest.raises(ShardError, match=r"cannot keep .*shard_0\.bin in the cache .*No space left.*lower the cache's"):
        cache.fetch(sources[0])
    assert entries(cache) == []


def test_threads_that_want_the_same_file_fetch_it_once(make, sources, monkeypatch):
    calls, fetch = [], remote.fetch

    def slow(url, file, **known):
        calls.append(url)
        time.sleep(0.1)
        return fetch(url, file, **known)

    monkeypatch.setattr(remote, "fetch", slow)
    cache = make()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(cache.fetch, [*sources[:2]] * 4))
    assert len(set(paths)) == 2
    assert sorted(calls) == sources[:2]
    for path in paths[2:]:
        cache.release(path)
    assert cache._uses.total() == 2


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7), st.booleans()), max_size=60))
def test_the_limit_holds_and_what_is_used_is_whole(tmp_path_factory, sequence):
    """Three caches as three processes: fetched ahead, never more than the limit; what is in use has its content."""
    folder = tmp_path_factory.mktemp("shared")
    for i, content in enumerate(CONTENTS):
        (folder / f"{i}.bin").write_bytes(content[: 100 + 50 * i])
    caches = [ShardCache(folder / "cache", 1000) for _ in range(3)]
    uses: list[tuple[ShardCache, int, str]] = []
    for who, shard, release in sequence:
        if release and uses:
            cache, _, path = uses.pop(shard % len(uses))
            cache.release(path)
            continue
        try:
            uses.append((caches[who], shard, caches[who].fetch(f"file://{folder}/{shard}.bin", ahead=True)))
        except NotNowError:
            in_use = {i: 100 + 50 * i for _, i, _ in uses}
            assert shard not in in_use
            assert sum(in_use.values()) + 100 + 50 * shard > 1000
        assert sum(path.stat().st_size for path in (folder / "cache").iterdir() if path.name[0] != ".") <= 1000
        assert all(Path(path).read_bytes() == CONTENTS[i][: 100 + 50 * i] for _, i, path in uses)
    for cache in caches:
        cache.close()


# Several processes

RANK = """
    import pathlib
    import random

    from mixloader.cache import ShardCache

    def read_all(folder, cache, names):
        for name in names:
            path = cache.fetch(f"s3://data/{{folder}}/{{name}}", bytes=65536)
            print(name, hash(pathlib.Path(path).read_bytes()), flush=True)
            cache.release(path)

    names = {urls!r}
    read_all("large", ShardCache("{folder}/large", 8 * 65536), names)
    small = ShardCache("{folder}/small", 4 * 65536)
    for _ in range(5):
        random.shuffle(names)
        read_all("small", small, names)
"""


def test_ranks_of_one_machine_share_their_folders(tmp_path):
    """Each object comes from S3 once where the cache holds all; where it does not, it keeps to its limit."""
    with s3_server() as s3:
        for i, content in enumerate(CONTENTS):
            for folder in ("large", "small"):
                s3.put(f"{folder}/shard_{i}.bin", content)
        urls = [f"shard_{i}.bin" for i in range(8)]
        program = RANK.format(urls=urls, folder=str(tmp_path))
        environment = {**os.environ, **s3.environment(), "PYTHONHASHSEED": "0"}
        ranks = [python(program, env=environment) for _ in range(2)]
        lines = [line for rank in ranks for line in rank.communicate(timeout=120)[0].splitlines()]
        assert [rank.returncode for rank in ranks] == [0, 0]
        assert len(lines) == 2 * 6 * 8
        assert len(set(lines)) == 8  # each name has one content
        assert sorted(read for read in s3.reads() if "large" in read) == [f"/data/large/{name}" for name in urls]
        for folder, kept in (("large", 8), ("small", 4)):
            contents = [path.read_bytes() for path in (tmp_path / folder).glob("*.bin")]
            assert len(contents) == kept
            assert all(content in CONTENTS for content in contents)


def test_a_killed_process_leaves_no_lock_and_no_partial_file(make, sources):
    cache = make(shards=2)
    program = """
        import sys, time
        from mixloader import remote
        from mixloader.cache import ShardCache

        cache = ShardCache({folder!r}, {limit})
        cache.fetch({used!r})

        def stuck(url, file, **known):
            file.write(b"partial")
            file.flush()
            print("ready", flush=True)
            time.sleep(60)

        remote.fetch = stuck
        cache.fetch({stuck!r})
    """
    program = program.format(folder=str(cache.folder), limit=cache.limit_bytes, used=sources[0], stuck=sources[1])
    process = python(program)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert entries(cache) == ["_1.bin.part", "shard_0.bin"]
    with pytest.raises(NotNowError) as caught:  # another process is at it
        cache.fetch(sources[1], ahead=True)
    assert not caught.value.full
    with pytest.raises(NotNowError) as caught:  # one file in use, and the room of the one under way is taken
        cache.fetch(sources[2], ahead=True)
    assert caught.value.full

    waiting = threading.Timer(0.2, process.send_signal, [signal.SIGKILL])
    waiting.start()
    path = cache.fetch(sources[1])  # waits until the lock of the killed process is gone
    assert process.wait(10) == -signal.SIGKILL
    process.communicate()
    assert Path(path).read_bytes() == CONTENTS[1]
    assert entries(cache) == ["shard_0.bin", "shard_1.bin"]
    cache.fetch(sources[2], ahead=True)  # what the killed process used is free
    assert entries(cache) == ["shard_1.bin", "shard_2.bin"]


def test_a_partial_file_of_a_killed_process_is_removed_when_the_cache_is_opened(make, tmp_path):
    folder = make().folder
    (folder / "0-dead.bin.part").write_bytes(b"partial")
    assert entries(make()) == []


def test_a_wait_for_another_process_is_given_up(make, sources, monkeypatch):
    mine, other = make(), make()
    busy, cancel = threading.Event(), threading.Event()

    def stuck(url, file, **known):
        busy.set()
        cancel.wait(10)
        raise remote.Cancelled(url)

    monkeypatch.setattr(remote, "fetch", stuck)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(other.fetch, sources[0])
        assert busy.wait(10)
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(remote.Cancelled):
            mine.fetch(sources[0], cancel=cancel)
        with pytest.raises(remote.Cancelled):
            first.result(10)


def test_names_of_entries_tell_files_apart():
    names = {
        cache_module._entry_name(url, known, version)
        for url in ("s3://a/x.bin", "s3://b/x.bin", "s3://a/../x y")
        for known in ({}, {"bytes": 1}, {"bytes": 2}, {"digest": "md5:0"}, {"compression": "zstd"}, {"stored_bytes": 1})
        for version in (None, "1 bytes, etag x")
    }
    assert len(names) == 33  # with a digest the version does not count
    assert all("/" not in name and not name.startswith(".") for name in names)
