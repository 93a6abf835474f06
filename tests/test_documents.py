"""Where documents begin in a row, and what is written of it, against plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import Boundaries, Reader, TokenType, described, read, windows, written

from mixloader import _core
from mixloader.errors import ShardError

BOUNDARIES = {"after": Boundaries.AFTER_EOT, "at": Boundaries.AT_EOT}
EOT = 0


def expected_documents(starts, tokens, seq_len):
    """positions, documents and masks [rows, seq_len], for documents that begin at the tokens `starts`."""
    starts = {start for start in starts if 0 < start < tokens}
    positions, documents, masks = [], [], []
    for row in range((tokens - 1) // seq_len):
        position, document = 0, 0
        for token in range(row * seq_len, row * seq_len + seq_len):
            if token in starts and token > row * seq_len:
                position, document = 0, document + 1
            positions.append(position)
            documents.append(document)
            masks.append(token + 1 in starts)
            position += 1
    shape = -1, seq_len
    return np.reshape(positions, shape), np.reshape(documents, shape), np.reshape(masks, shape)


def check(rows, tokens, starts, seq_len):
    """`rows` hold the tokens, and documents that begin at `starts`, with masked targets."""
    positions, documents, masks = expected_documents(starts, len(tokens), seq_len)
    assert (rows.positions == positions).all()
    assert (rows.documents == documents).all()
    expected = windows(tokens.astype(np.int64), seq_len)
    assert (rows.inputs == expected[:, :-1]).all()
    assert (rows.targets == np.where(masks, -100, expected[:, 1:])).all()


def with_table(path, shard, starts, *, width=8, bias=0, unit=1, offset=0):
    """The shard with a table of the tokens at which documents begin."""
    numbers = (np.asarray(starts, "u8") * unit + bias).astype(f"<u{width}")
    path.write_bytes(b"x" * offset + numbers.tobytes())
    table = {"path": str(path), "offset": offset, "count": len(starts), "width": width, "bias": bias, "unit": unit}
    return shard | {"documents": table}


# End-of-text tokens


@given(
    tokens=st.lists(st.sampled_from([EOT, EOT, *range(1, 9)]), min_size=2, max_size=250),
    seq_len=st.integers(1, 130),
    dtype=st.sampled_from(["u1", "u2", "i4", "u8"]),
    targets=st.sampled_from([TokenType.INT64, TokenType.INT32]),
    where=st.sampled_from(["after", "at"]),
    mmap=st.booleans(),
)
def test_documents_by_their_end_of_text(tmp_path, tokens, seq_len, dtype, targets, where, mmap):
    tokens, seq_len = np.array(tokens, dtype), min(seq_len, len(tokens) - 1)
    starts = np.flatnonzero(tokens == EOT) + (where == "after")
    options = {"boundaries": BOUNDARIES[where], "eot": EOT, "mask_targets": True, "targets": targets, "mmap": mmap}
    check(read([written(tmp_path / "a", tokens)], seq_len, **options), tokens, starts.tolist(), seq_len)


def test_an_end_of_text_that_the_dtype_cannot_hold_is_not_there(tmp_path):
    tokens = np.zeros(21, "u1")
    rows = read([written(tmp_path / "a", tokens)], 20, boundaries=Boundaries.AFTER_EOT, eot=256)
    assert (rows.positions == np.arange(20)).all()
    assert (rows.documents == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"boundaries": Boundaries.NONE},
        {"boundaries": Boundaries.AFTER_EOT, "shared": True},
        {"boundaries": Boundaries.AFTER_EOT, "targets": TokenType.UINT16},
    ],
)
def test_targets_that_cannot_be_masked_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="mask_targets needs boundaries"):
        Reader([written(tmp_path / "a", np.zeros(21, "u2"))], 20, mask_targets=True, **options)


def test_targets_stay_where_no_mask_is_asked_for(tmp_path):
    tokens = np.array([1, EOT, 2, 3, EOT], "u2")
    rows = read([written(tmp_path / "a", tokens)], 4, boundaries=Boundaries.AFTER_EOT, eot=EOT)
    assert (rows.targets == tokens[1:]).all()
    assert rows.documents.tolist() == [[0, 0, 1, 1]]


# Tables and extents


@given(
    tokens=st.integers(2, 300),
    seq_len=st.integers(1, 60),
    data=st.data(),
    width=st.sampled_from([4, 8]),
    bias=st.sampled_from([0, 1024]),
    unit=st.sampled_from([1, 2]),
    mmap=st.booleans(),
)
def test_documents_by_a_table(tmp_path, tokens, seq_len, data, width, bias, unit, mmap):
    """With and without entries for 0 and for the end, and with empty documents."""
    starts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=40)))
    seq_len = min(seq_len, tokens - 1)
    ids = np.arange(tokens, dtype="u2")
    shard = written(tmp_path / "a", ids)
    shard = with_table(tmp_path / "table", shard, starts, width=width, bias=bias, unit=unit, offset=5)
    reader_options = {"boundaries": Boundaries.INDEX, "mask_targets": True, "mmap": mmap}
    check(read([shard], seq_len, **reader_options), ids, starts, seq_len)

    core = Reader([shard], seq_len, **reader_options).core
    listed = starts if starts and starts[0] == 0 else [0, *starts]
    for window in range((tokens - 1) // seq_len):
        token = window * seq_len
        number = max(i for i, start in enumerate(listed) if start <= token)
        assert core.locate(0, window) == (0, token, number, listed[number])


@pytest.mark.parametrize("kind", ["even", "random", "few long ones", "one long one"])
def test_a_large_table_is_searched_with_few_reads(tmp_path, kind):
    count, tokens = 100_000, 10**9
    rng = np.random.default_rng(5)
    starts = {
        "even": np.arange(count) * (tokens // count),
        "random": np.sort(rng.integers(0, tokens, count)),
        "few long ones": np.sort((tokens * rng.random(count) ** 8).astype(np.int64)),
        "one long one": np.append(np.arange(count - 1), tokens - 5),
    }[kind]
    with (tmp_path / "tokens").open("wb") as file:
        file.truncate(2 * tokens)
    shard = with_table(tmp_path / "table", described(tmp_path / "tokens", "u2", tokens), starts)
    core = Reader([shard], 1000, batch_size=1).core
    unlisted = int(starts[0] != 0)
    for window in [0, 1, tokens // 1000 - 2, *rng.integers(0, tokens // 1000 - 1, 100).tolist()]:
        _core._fail_io("read", nth=1000)
        found = core.locate(0, window)
        assert _core._heal_io() <= 2 * np.log2(count / 512) + 4
        number = int(np.searchsorted(starts, window * 1000, side="right")) - 1
        document = (number + unlisted, starts[number]) if number >= 0 else (0, 0)
        assert found == (0, window * 1000, *document)


def test_a_table_within_the_shard_itself(tmp_path):
    tokens = np.arange(41, dtype="u2")
    path = tmp_path / "chunk"
    path.write_bytes(np.array([100, 114, 182], "<u4").tobytes() + bytes(88) + tokens.tobytes())
    table = {"path": str(path), "offset": 0, "count": 3, "width": 4, "bias": 100, "unit": 2}
    shard = described(path, "u2", 41, offset=100, documents=table)
    for mmap in False, True:
        check(read([shard], 8, boundaries=Boundaries.INDEX, mask_targets=True, mmap=mmap), tokens, [0, 7, 41], 8)


@pytest.mark.parametrize("equal", [False, True])
def test_documents_that_are_the_extents(tmp_path, equal):
    sizes = [6] * 10 if equal else [6, 1, 0, 20, 3, 3, 17, 10]
    tokens = np.arange(60, dtype="u2")
    ends = np.cumsum(sizes)
    places = np.array([2 * (end - size) + 4 * i for i, (end, size) in enumerate(zip(ends, sizes, strict=True))], "u8")
    path = tmp_path / "a"
    path.write_bytes(
        b"".join(tokens[end - size : end].tobytes() + b"gaps" for end, size in zip(ends, sizes, strict=True))
    )
    fields = {"extent_tokens": 6, "extent_stride": 16}
    if not equal:
        fields = {"extent_ends": ends.astype("u8"), "extent_bytes": places}
    shard = described(path, "u2", 60, extents_are_documents=True, **fields)
    starts = (ends - sizes).tolist()
    check(read([shard], 9, boundaries=Boundaries.INDEX, mask_targets=True), tokens, starts, 9)
    core = Reader([shard], 9).core
    for window in range(6):
        number = int(np.searchsorted(ends, window * 9, side="right"))
        assert core.locate(0, window) == (0, window * 9, number, starts[number])


# Tables that are damaged


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([0, 50, 20], r"document 2 \(byte 16\) has 20, which is no token"),
        ([0, 20, 2**60], r"document 2 \(byte 16\) has 1152921504606846976"),
        ([0, 20, 102], r"document 2 \(byte 16\) has 102"),
    ],
)
def test_a_table_of_no_ascending_tokens(tmp_path, numbers, reason):
    shard = with_table(tmp_path / "table", written(tmp_path / "a", np.zeros(101, "u2")), numbers)
    with pytest.raises(ShardError, match=f"index of documents .*table is damaged: {reason}"):
        read([shard], 100, boundaries=Boundaries.INDEX)


@pytest.mark.parametrize("number", [99, 101])
def test_a_table_of_bytes_that_are_no_token(tmp_path, number):
    shard = written(tmp_path / "a", np.zeros(101, "u2"))
    (tmp_path / "table").write_bytes(np.array([number], "<u8").tobytes())
    shard |= {"documents": {"path": str(tmp_path / "table"), "offset": 0, "count": 1, "bias": 100, "unit": 2}}
    with pytest.raises(ShardError, match=f"document 0 .* has {number}"):
        read([shard], 100, boundaries=Boundaries.INDEX)


def test_a_table_that_is_missing_or_too_short(tmp_path):
    shard = with_table(tmp_path / "table", written(tmp_path / "a", np.zeros(101, "u2")), [0, 3, 9])
    (tmp_path / "table").write_bytes(bytes(23))
    with pytest.raises(ShardError, match="table has 23 bytes, but its 3 documents need 24"):
        read([shard], 100, boundaries=Boundaries.INDEX)
    (tmp_path / "table").unlink()
    with pytest.raises(ShardError, match=r"cannot open index of documents .*table: No such file"):
        read([shard], 100, boundaries=Boundaries.INDEX)


def test_a_shard_without_an_index(tmp_path):
    with pytest.raises(ShardError, match="a has no index of its documents; ask for boundaries by its end-of-text"):
        read([written(tmp_path / "a", np.zeros(101, "u2"))], 100, boundaries=Boundaries.INDEX)
