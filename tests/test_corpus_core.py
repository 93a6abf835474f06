"""Bytes on disk to rows: every width and type, extents, checksums, against numpy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import DTYPES, Reader, TokenType, described, read, windows, written

from mixloader import _core
from mixloader.errors import ShardError, TokenError

WIDTHS = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"]


# Types


@given(
    dtype=st.sampled_from(WIDTHS),
    inputs=st.sampled_from(list(DTYPES)),
    targets=st.sampled_from(list(DTYPES)),
    shared=st.booleans(),
    mmap=st.booleans(),
    seq_len=st.integers(1, 70),
    offset=st.integers(0, 9),
    data=st.data(),
)
def test_rows_are_what_numpy_reads(tmp_path, dtype, inputs, targets, shared, mmap, seq_len, offset, data):
    largest = min(np.iinfo(dtype).max, *(np.iinfo(DTYPES[t]).max for t in (inputs, targets)))
    size = data.draw(st.integers(seq_len + 1, 300))
    tokens = np.random.default_rng(size).integers(0, largest, size, dtype=np.uint64, endpoint=True).astype(dtype)
    path = tmp_path / "shard.bin"
    path.write_bytes(b"x" * offset + tokens.tobytes())
    shard = described(path, dtype, size, offset=offset)
    rows = read([shard], seq_len, inputs=inputs, targets=targets, shared=shared, mmap=mmap)
    expected = windows(tokens, seq_len)
    if shared:
        assert (rows.inputs == expected.astype(DTYPES[inputs])).all()
    else:
        assert (rows.inputs == expected[:, :-1].astype(DTYPES[inputs])).all()
        assert (rows.targets == expected[:, 1:].astype(DTYPES[targets])).all()


@pytest.mark.parametrize("mmap", [False, True])
def test_a_row_longer_than_what_is_widened_at_a_time(tmp_path, mmap):
    tokens = np.arange(20_001, dtype="u2")
    rows = read([written(tmp_path / "a", tokens)], 10_000, mmap=mmap)
    assert (rows.inputs.ravel() == tokens[:-1]).all()
    assert (rows.targets.ravel() == tokens[1:]).all()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("position", [0, 1, 63, 99, 100])
@pytest.mark.parametrize(
    ("dtype", "bad", "options", "reason"),
    [
        ("u2", 500, {"vocab_size": 500}, "token id 500 .* the vocabulary has 500 ids"),
        ("u8", 2**63, {}, f"token id {2**63} .* only ids below {2**63}"),
        ("u4", 2**31, {"inputs": TokenType.INT32}, f"token id {2**31} .* only ids below {2**31}"),
        ("u4", 2**16, {"inputs": TokenType.UINT16, "shared": True}, "token id 65536 .* only ids below 65536"),
        ("u4", 2**31, {"targets": TokenType.INT32}, f"token id {2**31} .* only ids below {2**31}"),
        ("i1", -1, {}, "token id -1 .* ids count from 0"),
        ("i2", -3, {"vocab_size": 500}, "token id -3 .* ids count from 0"),
        ("i4", -(2**31), {"inputs": TokenType.INT32}, f"token id {-(2**31)} .* ids count from 0"),
        ("i8", -100, {"vocab_size": 500}, "token id -100 .* ids count from 0"),
    ],
)
def test_an_id_that_cannot_be_is_named_with_its_place(tmp_path, mmap, position, dtype, bad, options, reason):
    tokens = np.ones(101, dtype)
    tokens[position] = bad
    shard = written(tmp_path / "shard.bin", tokens)
    place = rf"at token {position} \(byte {position * tokens.itemsize}\)"
    with pytest.raises(TokenError, match=f"shard.bin holds {reason}") as error:
        read([shard], 100, mmap=mmap, **options)
    assert error.match(place)


def test_rows_of_other_shards_are_not_stopped_by_a_bad_one(tmp_path):
    good, bad = np.arange(41, dtype="u2"), np.full(41, 999, "u2")
    shards = [written(tmp_path / "good", good), written(tmp_path / "bad", bad)]
    reader = Reader(shards, 10, batch_size=1, vocab_size=100)
    while (window := reader.order()[0]) < 4:
        assert (reader.next().inputs == windows(good, 10)[window, :-1]).all()
    token = (window - 4) * 10
    for _ in range(3):
        with pytest.raises(TokenError, match=rf"bad holds token id 999 at token {token} \(byte {2 * token}\)"):
            reader.next()


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 3},
        {"offset": 2**63},
        {"tokens": 2**63},
        {"tokens": 2**62, "width": 8},
        {"extent_tokens": 1, "extent_stride": 2**62},
        {"extent_ends": np.array([5], "u8"), "extent_bytes": np.array([0, 9], "u8")},
        {"extent_ends": np.array([5], "u8"), "extent_bytes": np.array([0], "u8")},
        {"extent_ends": np.array([50, 41], "u8"), "extent_bytes": np.array([0, 0], "u8")},
        {"extent_ends": np.array([41], "u8"), "extent_bytes": np.array([2**63], "u8")},
        {"extent_ends": np.array([41], "i8"), "extent_bytes": np.array([0], "u8")},
        {"documents": {"path": "x", "offset": 0, "count": 2**62}},
        {"documents": {"path": "x", "offset": 0, "count": 2, "width": 2}},
        {"documents": {"path": "x", "offset": 0, "count": 2, "unit": 0}},
    ],
)
def test_sizes_that_no_file_could_have_are_refused(tmp_path, fields):
    shard = written(tmp_path / "a", np.arange(41, dtype="u2")) | fields
    with pytest.raises(ValueError, match=r"shard|array of uint64"):
        Reader([shard], 10, batch_size=1)


# Extents


@st.composite
def extents(draw):
    """(tokens, bytes of the file, fields of the shard): extents of any sizes, in any order."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(lambda s: sum(s) > 10))
    gaps = draw(st.lists(st.sampled_from([0, 1, 7, 5000]), min_size=len(sizes), max_size=len(sizes)))
    order = draw(st.one_of(st.just(list(range(len(sizes)))), st.permutations(range(len(sizes)))))
    tokens = np.arange(1, sum(sizes) + 1, dtype=draw(st.sampled_from(["u2", "i4", "u8"])))
    ends = np.cumsum(sizes)
    places = np.zeros(len(sizes), "u8")
    file = b"head"
    for i in order:
        file += b"\xff" * gaps[i]
        places[i] = len(file)
        file += tokens[ends[i] - sizes[i] : ends[i]].tobytes()
    return tokens, file, {"extent_ends": ends.astype("u8"), "extent_bytes": places}


@given(case=extents(), seq_len=st.integers(1, 60), mmap=st.booleans(), checked=st.booleans())
def test_windows_go_across_extents(tmp_path, case, seq_len, mmap, checked):
    tokens, file, fields = case
    path = tmp_path / "shard"
    path.write_bytes(file)
    if checked:
        fields |= {"checksums": str(tmp_path / "sums")}
        _core.write_checksums(str(path), fields["checksums"], 512)
    seq_len = min(seq_len, len(tokens) - 1)
    rows = read([described(path, tokens.dtype, len(tokens), **fields)], seq_len, shared=True, mmap=mmap)
    assert (rows.inputs == windows(tokens, seq_len)).all()


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(("size", "last", "gap"), [(10, 10, 0), (10, 3, 6), (10, 1, 9000), (1, 1, 3), (100, 50, 1)])
def test_windows_go_across_extents_of_equal_size(tmp_path, size, last, gap, mmap):
    extents = 30 if size < 100 else 3
    tokens = np.arange((extents - 1) * size + last, dtype="u4")
    path = tmp_path / "shard"
    parts = [tokens[i : i + size].tobytes() for i in range(0, len(tokens), size)]
    path.write_bytes(b"x" * 5 + (b"\xff" * gap).join(parts))
    fields = {"offset": 5, "extent_tokens": size, "extent_stride": 4 * size + gap}
    rows = read([described(path, "u4", len(tokens), **fields)], 7, shared=True, mmap=mmap)
    assert (rows.inputs == windows(tokens, 7)).all()


def test_a_row_across_near_extents_is_one_read(tmp_path):
    tokens = np.arange(1000, dtype="u2")
    path = tmp_path / "shard"
    path.write_bytes(b"".join(b"head" + tokens[i : i + 10].tobytes() for i in range(0, 1000, 10)))
    shard = described(path, "u2", 1000, offset=4, extent_tokens=10, extent_stride=24)
    reader = Reader([shard], 99, batch_size=10)
    reader.next()
    _core._fail_io("read", nth=1000)
    reader.next()
    assert _core._heal_io() == 10


def test_a_bad_id_in_an_extent_is_named_with_its_byte(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(b"head" + np.array([1, 2, 3], "u2").tobytes() + b"gap" + np.array([4, 99], "u2").tobytes())
    shard = described(path, "u2", 5, offset=4, extent_tokens=3, extent_stride=9)
    with pytest.raises(TokenError, match=r"token id 99 at token 4 \(byte 15\)"):
        read([shard], 4, vocab_size=50)


def test_an_extent_that_the_file_does_not_reach(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(bytes(19))
    shard = described(path, "u2", 10, extent_tokens=5, extent_stride=10)
    with pytest.raises(ShardError, match="has 19 bytes, but its 10 tokens need 20"):
        read([shard], 4)


@pytest.mark.parametrize("mmap", [False, True])
def test_offsets_beyond_four_gigabytes(tmp_path, mmap):
    path = tmp_path / "sparse"
    first = (1 << 33) + 2
    tokens = np.arange(101, dtype="u2")
    with path.open("wb") as file:
        file.seek(first)
        file.write(tokens.tobytes())
    shard = described(path, "u2", 101, offset=first)
    assert (read([shard], 50, shared=True, mmap=mmap).inputs == windows(tokens, 50)).all()
    # More tokens than 32 bits count.
    whole = described(path, "u2", first // 2 + 101)
    core = Reader([whole], 1 << 20, batch_size=1, mmap=mmap).core
    assert core.locate(0, 4095) == (0, 4095 << 20, None, None)


# Checksums


@pytest.mark.parametrize(
    ("size", "seed", "expected"),
    [
        # The vectors of the reference implementation's sanity test (xxHash, tests/sanity_test_vectors.h).
        (0, 0, 0xEF46DB3751D8E999),
        (0, 2654435761, 0xAC75FDA2929B17EF),
        (1, 0, 0xE934A84ADB052768),
        (1, 2654435761, 0x5014607643A9B4C3),
        (4, 0, 0x9136A0DCA57457EE),
        (14, 0, 0x8282DCC4994E35C8),
        (14, 2654435761, 0xC3BD6BF63DEB6DF0),
        (222, 0, 0xB641AE8CB691C174),
        (222, 2654435761, 0x20CB8AB7AE10C14A),
    ],
)
def test_xxh64_gives_the_published_vectors(size, seed, expected):
    data, state = bytearray(), 2654435761
    for _ in range(size):
        data.append(state >> 56)
        state = state * 11400714785074694797 % 2**64
    assert _core.xxh64(bytes(data), seed) == expected


@pytest.mark.parametrize("mmap", [False, True])
def test_damage_is_found_in_the_row_that_it_is_in(tmp_path, mmap):
    tokens = np.arange(10_001, dtype="u2")
    shard = written(tmp_path / "shard", tokens, checksums=str(tmp_path / "sums"))
    _core.write_checksums(shard["path"], shard["checksums"], 512)
    assert (read([shard], 100, shared=True, mmap=mmap).inputs == windows(tokens, 100)).all()
    _core.verify(shard["path"], shard["checksums"])

    with open(shard["path"], "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 4]))
    reader = Reader([shard], 100, batch_size=1, shared=True, mmap=mmap)
    block = 9  # of 512 bytes
    while block not in range((row := reader.order()[0]) * 200 // 512, (row * 200 + 201) // 512 + 1):
        assert (reader.next().inputs == windows(tokens, 100)[row]).all()
    for _ in range(2):
        with pytest.raises(ShardError, match=r"shard is damaged in block 9, bytes 4608 to 5120: .*sums \(1 of"):
            reader.next()
    with pytest.raises(ShardError, match=r"block 9, .*\(1 of 40 blocks checked do not\); restore it"):
        _core.verify(shard["path"], shard["checksums"])


@given(position=st.integers(0, 4095), bit=st.integers(0, 7), part=st.sampled_from(["file", "sums"]))
def test_any_flipped_bit_is_found(tmp_path, position, bit, part):
    path, sums = tmp_path / "file", tmp_path / "sums"
    path.write_bytes(np.random.default_rng(1).bytes(3000))
    _core.write_checksums(str(path), str(sums), 512)
    damaged = path if part == "file" else sums
    data = bytearray(damaged.read_bytes())
    data[position % len(data)] ^= 1 << bit
    damaged.write_bytes(data)
    with pytest.raises(ShardError, match=r"file is damaged in block|sums is damaged"):
        _core.verify(str(path), str(sums))


def test_a_block_moved_to_another_place_is_found(tmp_path):
    path = tmp_path / "file"
    data = np.random.default_rng(1).bytes(2048)
    path.write_bytes(data)
    _core.write_checksums(str(path), f"{path}.sums", 512)
    path.write_bytes(data[512:1024] + data[:512] + data[1024:])
    with pytest.raises(ShardError, match=r"block 0, .*\(2 of 4"):
        _core.verify(str(path), f"{path}.sums")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5_000_000])
def test_files_of_any_size_have_checksums(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    _core.write_checksums(str(path), f"{path}.sums", 512)
    _core.verify(str(path), f"{path}.sums")
    path.write_bytes(bytes(size + 1))
    with pytest.raises(ShardError, match=f"has {size + 1} bytes, but had {size} when its checksums were written"):
        _core.verify(str(path), f"{path}.sums")


@pytest.mark.parametrize("size", [0, 100, 256, 2**31])
def test_block_sizes_that_are_no_power_of_two_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="expected a power of two"):
        _core.write_checksums(str(tmp_path / "file"), str(tmp_path / "sums"), size)


def test_no_sidecar(tmp_path):
    shard = written(tmp_path / "shard", np.arange(11, dtype="u2"), checksums=str(tmp_path / "sums"))
    with pytest.raises(ShardError, match=r"cannot open checksums .*sums: No such file"):
        read([shard], 10)
    (tmp_path / "sums").write_bytes(b"short")
    with pytest.raises(ShardError, match="sums is damaged, or no sidecar of checksums"):
        read([shard], 10)


# What is open


@pytest.mark.parametrize("mmap", [False, True])
def test_more_shards_than_a_process_may_have_descriptors(tmp_path, mmap):
    """The limit is lowered after the core has looked at it, so that it meets it."""
    code = f"""
import os, resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import numpy as np
from reading import Reader, written
shards = [written(Path(f"shard{{i}}"), np.full(21, i, "u2")) for i in range(200)]
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
readers = [Reader(shards, 20, batch_size=40, threads=threads, mmap={mmap}) for threads in (0, 2)]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
for reader in readers:
    for batch in range(20):
        assert (reader.next().inputs == np.array(reader.order())[:, None]).all()
free = []
try:
    while True: free.append(os.open("shard0", os.O_RDONLY))
except OSError: pass
del readers
last = Reader(shards, 20, batch_size=40, mmap={mmap})
while True:
    try: free.append(os.open("shard0", os.O_RDONLY))
    except OSError: break
try:
    last.next()
except Exception as error:
    print(type(error).__name__, error)
os.close(free.pop())
if free: os.close(free.pop())
assert (last.next().inputs == np.array(last.order())[:, None]).all()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "ShardError cannot open shard" in result.stdout
    assert "this process may open 40 files at a time: raise the limit (ulimit -n)" in result.stdout
