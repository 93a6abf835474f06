"""Which pieces stand in which packed row, and the cache of sidecars that list them."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from bisect import bisect_left
from pathlib import Path

import numpy as np
import pytest
from corpora import write_raw
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import AFTER, AT, EOT, INDEX, corpora, rows_of, write_documents

from mixloader import _core
from mixloader.errors import ManifestError, ShardError
from mixloader.formats.base import Documents, Extents, Shard
from mixloader.packing import cache_folder, pack_rows


def packed_by_reference(lengths, seq_len, block=1 << 16):
    """Best-fit decreasing, as csrc/packer.h describes it: rows of (token, tokens)."""
    rows, begin = [], 0
    for first in range(0, len(lengths), block):
        rest = []
        for length in lengths[first : first + block]:
            end = begin + length
            while end - begin > seq_len:
                rows.append([(begin, seq_len + 1)])
                begin += seq_len
            if end - begin >= 2:
                rest.append((begin, end - begin))
            begin = end
        bins, left = [], []  # left: (slots left, -when they became so, bin), ascending
        for now, piece in enumerate(sorted(rest, key=lambda piece: -piece[1])):
            slots = piece[1] - 1
            i = bisect_left(left, (slots,))
            room, _, index = left.pop(i) if i < len(left) else (seq_len, 0, len(bins))
            if index == len(bins):
                bins.append([])
            bins[index].append(piece)
            if room > slots:
                entry = (room - slots, -now, index)
                left.insert(bisect_left(left, entry), entry)
        rows += [sorted(row) for row in bins]
    return rows


def first_fit_rows(lengths, seq_len):
    """How many rows first-fit needs, documents in order and cut likewise."""
    full = sum((length - 1) // seq_len for length in lengths)
    room = []
    for slots in (n for n in ((length - 1) % seq_len for length in lengths) if n):
        i = next((i for i, left in enumerate(room) if left >= slots), len(room))
        if i == len(room):
            room.append(seq_len)
        room[i] -= slots
    return full + len(room)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packing"


# Which pieces stand in which row


@pytest.mark.parametrize("boundaries", [AFTER, AT, INDEX], ids=lambda b: b.name)
@given(corpus=corpora, dtype=st.sampled_from(["<u2", "<u4"]))
@settings(max_examples=60)
def test_rows_are_best_fit_decreasing(tmp_path, cache, boundaries, corpus, dtype):
    seq_len, lengths = corpus
    shard = write_documents(tmp_path / "a.bin", lengths, boundaries, dtype)
    [packed] = pack_rows([shard], seq_len, boundaries=boundaries, eot=EOT)
    expected = packed_by_reference(lengths, seq_len)
    assert rows_of(packed.path) == expected
    reader = _core.PackedRows(packed.path)
    assert [reader.row(i) for i in range(packed.rows)] == expected
    assert packed.targets == sum(length - 1 for length in lengths)


@given(corpus=corpora)
def test_every_token_but_a_documents_first_is_a_target_once(tmp_path, cache, corpus):
    seq_len, lengths = corpus
    [packed] = pack_rows([write_documents(tmp_path / "a.bin", lengths)], seq_len, boundaries=AFTER, eot=EOT)
    document = np.repeat(np.arange(len(lengths)), lengths)
    targets = []
    for row in rows_of(packed.path):
        assert 0 < sum(tokens - 1 for _, tokens in row) <= seq_len
        for token, tokens in row:
            assert document[token] == document[token + tokens - 1]
            targets += range(token + 1, token + tokens)
    firsts = set((np.cumsum(lengths) - lengths).tolist())
    assert sorted(targets) == [i for i in range(sum(lengths)) if i not in firsts]


@pytest.mark.parametrize(("mean", "spread"), [(400, 1.1), (60, 0.8), (2000, 1.3)])
def test_rows_are_fuller_than_those_of_first_fit(tmp_path, cache, mean, spread):
    """Not for any lengths: 5, 3, 2, 4, 3, 3 slots in rows of 10 fit in two by luck. For those that texts have."""
    rng = np.random.default_rng(0)
    lengths = 2 + np.exp(rng.normal(np.log(mean), spread, 3000)).astype(int)
    shard = write_documents(tmp_path / "a.bin", lengths)
    for seq_len in (512, 1024, 4096):
        [packed] = pack_rows([shard], seq_len, boundaries=AFTER, eot=EOT)
        assert packed.rows <= first_fit_rows(lengths.tolist(), seq_len)
        assert packed.targets / (packed.rows * seq_len) > 0.97


def test_blocks_of_documents_are_packed_apart(tmp_path, cache):
    lengths = np.random.default_rng(0).integers(1, 12, (1 << 17) + 1000)
    [packed] = pack_rows([write_documents(tmp_path / "a.bin", lengths)], 32, boundaries=AFTER, eot=EOT)
    assert rows_of(packed.path) == packed_by_reference(lengths.tolist(), 32)
    _core.PackedRows(packed.path).verify()


def test_extents_are_packed_as_one_run_would_be(tmp_path, cache):
    lengths = np.random.default_rng(0).integers(1, 300, 2000)
    whole = write_documents(tmp_path / "whole.bin", lengths)
    tokens = np.fromfile(whole.path, dtype="<u2")
    gaps = np.full((-(-len(tokens) // 100), 103), EOT, dtype="<u2")
    for i, row in enumerate(gaps):
        part = tokens[100 * i : 100 * (i + 1)]
        row[: len(part)] = part
    write_raw(tmp_path / "gaps.bin", gaps)
    equal = Shard(
        **(vars(whole) | {"path": str(tmp_path / "gaps.bin"), "bytes": gaps.nbytes, "extents": Extents(100, 206)})
    )
    ends = np.minimum(np.arange(1, len(gaps) + 1) * 100, len(tokens)).astype(np.uint64)
    starts = np.arange(len(gaps), dtype=np.uint64) * 206
    listed = Shard(**(vars(equal) | {"extents": Extents(ends=ends, bytes=starts)}))
    packed = pack_rows([whole, equal, listed], 64, boundaries=AFTER, eot=EOT)
    assert rows_of(packed[0].path) == rows_of(packed[1].path) == rows_of(packed[2].path)
    assert len({p.path for p in packed}) == 3


def test_extents_that_are_documents_are_packed(tmp_path, cache, monkeypatch):
    lengths = [10, 3, 25, 1, 8]
    shard = write_documents(tmp_path / "a.bin", lengths)
    ends = np.cumsum(lengths).astype(np.uint64)
    known = shard.for_core() | {
        "extent_ends": ends,
        "extent_bytes": 2 * (ends - np.array(lengths, dtype=np.uint64)),
        "extents_are_documents": True,
    }
    monkeypatch.setattr(Shard, "for_core", lambda self: known)
    [packed] = pack_rows([shard], 8, boundaries=INDEX)
    assert rows_of(packed.path) == packed_by_reference(lengths, 8)


def test_a_shard_of_lone_tokens_has_no_rows(tmp_path, cache):
    [packed] = pack_rows([write_documents(tmp_path / "a.bin", [1] * 50)], 8, boundaries=AFTER, eot=EOT)
    assert (packed.rows, packed.targets) == (0, 0)


# The cache of sidecars


def test_a_sidecar_serves_copies_and_not_other_content_lengths_or_boundaries(tmp_path, cache):
    lengths = [40, 30, 20, 10] * 20
    shard = write_documents(tmp_path / "a.bin", lengths)
    [first] = pack_rows([shard], 32, boundaries=AFTER, eot=EOT)
    made = os.stat(first.path).st_ino
    copy = write_documents(tmp_path / "sub" / "b.bin", lengths)
    assert pack_rows([copy, shard], 32, boundaries=AFTER, eot=EOT) == [first, first]
    assert os.stat(first.path).st_ino == made
    others = [
        pack_rows([shard], 33, boundaries=AFTER, eot=EOT),
        pack_rows([shard], 32, boundaries=AT, eot=EOT),
        pack_rows([shard], 32, boundaries=AFTER, eot=EOT + 1),
        pack_rows([write_documents(tmp_path / "a.bin", lengths[::-1])], 32, boundaries=AFTER, eot=EOT),
    ]
    assert len({first.path, *(packed.path for [packed] in others)}) == 5
    assert sorted(path.suffix for path in cache.iterdir()) == [".rows"] * 5


def test_damage_anywhere_is_noticed_and_mended(tmp_path, cache):
    shard = write_documents(tmp_path / "a.bin", [5, 9, 3, 30])
    [packed] = pack_rows([shard], 8, boundaries=AFTER, eot=EOT)
    sidecar = Path(packed.path)
    whole = sidecar.read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 5)] + [whole + b"\0" * 16]
    damaged += [whole[:i] + bytes([whole[i] ^ 0x40]) + whole[i + 1 :] for i in range(len(whole))]
    for content in damaged:
        sidecar.write_bytes(content)
        with pytest.raises(ShardError, match=sidecar.name):
            _core.PackedRows(str(sidecar)).verify()
    assert pack_rows([shard], 8, boundaries=AFTER, eot=EOT) == [packed]
    assert sidecar.read_bytes() == whole


def test_a_sidecar_under_anothers_name_is_made_anew(tmp_path, cache):
    first, second = (write_documents(tmp_path / f"{n}.bin", [n, 9, 3]) for n in (5, 6))
    a, b = pack_rows([first, second], 8, boundaries=AFTER, eot=EOT)
    Path(b.path).write_bytes(Path(a.path).read_bytes())
    assert pack_rows([first, second], 8, boundaries=AFTER, eot=EOT) == [a, b]
    assert rows_of(b.path) == packed_by_reference([6, 9, 3], 8)


def test_a_killed_build_is_gone_on_with(tmp_path, cache):
    """Killed in the third of five shards: two whole sidecars, a torn file that nobody owns, and no lock."""
    shards = [write_documents(tmp_path / f"{i}.bin", [20 + i] * 50) for i in range(5)]
    code = f"""
        import os, signal
        from mixloader import _core, packing
        from mixloader.formats import open_shard
        made, build = [], _core.pack_shard
        def torn(*arguments):
            if len(made) == 2:
                os.write(arguments[5], b"torn")
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(build(*arguments))
            return made[-1]
        _core.pack_shard = torn
        shards = [open_shard(f"{tmp_path}/{{i}}.bin") for i in range(5)]
        packing.pack_rows(shards, 8, boundaries=_core.Boundaries.AFTER_EOT, eot={EOT}, threads=1)
    """
    killed = start_python(code)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in cache.iterdir()) == [".rows", ".rows", ".tmp"]
    whole = {path.name: path.stat().st_ino for path in cache.glob("*.rows")}
    packed = pack_rows(shards, 8, boundaries=AFTER, eot=EOT)
    assert sorted(path.name for path in cache.iterdir()) == sorted(os.path.basename(p.path) for p in packed)
    assert {name: (cache / name).stat().st_ino for name in whole} == whole


def test_processes_share_the_work(tmp_path, cache):
    """Each of eight shards is packed by one of two processes, and either gets all of them."""
    for i in range(8):
        write_documents(tmp_path / f"{i}.bin", [20 + i] * 2000)
    code = f"""
        import time
        from mixloader import _core, packing
        from mixloader.formats import open_shard
        build = _core.pack_shard
        def slow(*arguments):
            with open("{tmp_path}/log", "a") as log:
                log.write(arguments[6] + chr(10))
            time.sleep(0.02)
            return build(*arguments)
        _core.pack_shard = slow
        shards = [open_shard(f"{tmp_path}/{{i}}.bin") for i in range(8)]
        print(packing.pack_rows(shards, 8, boundaries=_core.Boundaries.AFTER_EOT, eot={EOT}, threads=2))
    """
    processes = [start_python(code) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(printed) == 1
    built = (tmp_path / "log").read_text().split()
    assert len(built) == len(set(built)) == 8
    assert len(list(cache.iterdir())) == 8


# What cannot be packed


def test_what_cannot_be_packed_is_refused(tmp_path, cache, monkeypatch):
    shard = write_documents(tmp_path / "a.bin", [5, 9])
    with pytest.raises(ValueError, match="where they begin"):
        pack_rows([shard], 8, boundaries=_core.Boundaries.NONE)
    with pytest.raises(ValueError, match="seq_len is 0"):
        pack_rows([shard], 0, boundaries=AFTER)
    with pytest.raises(ManifestError, match=r"a\.bin has no index"):
        pack_rows([shard], 8, boundaries=INDEX)
    monkeypatch.setattr(Shard, "for_core", lambda self: {"name": "s3://b/a.zst", "path": ""})
    with pytest.raises(ManifestError, match=r"s3://b/a\.zst is remote or compressed"):
        pack_rows([shard], 8, boundaries=AFTER)


@pytest.mark.parametrize("boundaries", [AFTER, INDEX], ids=lambda b: b.name)
def test_a_shard_that_cannot_be_read_is_named_and_leaves_nothing(tmp_path, cache, boundaries):
    good, bad = (write_documents(tmp_path / f"{name}.bin", [30] * 50, boundaries) for name in "ab")
    damaged = Path(bad.documents.path if boundaries == INDEX else bad.path)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ShardError, match=damaged.name):
        pack_rows([good, bad], 8, boundaries=boundaries, eot=EOT)
    assert not list(cache.glob("*.tmp"))
    damaged.unlink()
    with pytest.raises(ShardError, match=damaged.name):
        pack_rows([good, bad], 8, boundaries=boundaries, eot=EOT)
    assert pack_rows([good], 8, boundaries=boundaries, eot=EOT)[0].targets == 29 * 50


@pytest.mark.parametrize("starts", [[0, 30, 20], [0, 30, 1501]], ids=["descends", "beyond"])
def test_an_index_that_is_none_is_refused(tmp_path, cache, starts):
    shard = write_documents(tmp_path / "a.bin", [30] * 50)
    np.array(starts, dtype="<u4").tofile(tmp_path / "starts")
    documents = Documents(path=str(tmp_path / "starts"), offset=0, count=3, width=4)
    with pytest.raises(ShardError, match="starts"):
        pack_rows([Shard(**(vars(shard) | {"documents": documents}))], 8, boundaries=INDEX)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, cache):
    shard = write_documents(tmp_path / "a.bin", [5, 9])
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"cannot keep packed rows in .*file.*MIXLOADER_CACHE"):
        pack_rows([shard], 8, boundaries=AFTER, cache_dir=tmp_path / "file")
    with open("/dev/full", "wb") as full, pytest.raises(ShardError, match="No space left"):
        _core.pack_shard(shard.for_core(), 8, AFTER, EOT, b"x" * 16, full.fileno(), "/cache/a")


@pytest.mark.parametrize("boundaries", [AFTER, INDEX], ids=lambda b: b.name)
@pytest.mark.parametrize("call", ["open", "read", "write"])
def test_a_build_meets_every_failure_of_the_system(tmp_path, cache, boundaries, call):
    """Short and interrupted calls change nothing; others name the file and leave nothing behind."""
    shard = write_documents(tmp_path / "a.bin", [30, 5, 12] * 40, boundaries)
    seen = {"open": "cannot open", "read": "cannot read", "write": "cannot write"}[call]

    def build():
        return rows_of(pack_rows([shard], 8, boundaries=boundaries, eot=EOT)[0].path)

    _core._fail_io(call, nth=1 << 40)
    expected = build()
    calls = _core._heal_io()
    assert calls
    failures = []
    for fault in ({"is_short": True}, {"error": errno.EINTR}, {"error": errno.EIO}):
        for nth in range(1, calls + 1):
            for sidecar in cache.iterdir():
                sidecar.unlink()
            _core._fail_io(call, nth=nth, **fault)
            try:
                assert build() == expected  # a sidecar that cannot be looked at is made anew
            except ShardError as error:
                failures.append((fault, str(error)))
            finally:
                _core._heal_io()
            assert not list(cache.glob("*.tmp"))
    assert failures
    assert all(fault == {"error": errno.EIO} and seen in message for fault, message in failures)
    assert build() == expected


def test_the_cache_folder_is_given_or_in_the_environment_or_at_home(monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", "/somewhere")
    assert (cache_folder("/here"), cache_folder()) == (Path("/here"), Path("/somewhere"))
    monkeypatch.delenv("MIXLOADER_CACHE")
    monkeypatch.setenv("HOME", "/home/x")
    assert cache_folder() == Path("/home/x/.cache/mixloader")


def start_python(code):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
