"""Packed rows as the core draws them, against rows written in plain Python."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import AFTER, EOT, HEADER, INDEX, corpora, rows_of, write_documents

from mixloader import _core
from mixloader.errors import ShardError, TokenError
from mixloader.packing import pack_rows
from mixloader.reference import domain_key

TYPES = {
    _core.TokenType.INT64: np.dtype("<i8"),
    _core.TokenType.INT32: np.dtype("<i4"),
    _core.TokenType.UINT16: np.dtype("<u2"),
}
INT64, INT32, UINT16 = TYPES


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packing"


def stream(shards, seq_len, batch_size, steps, **options):
    """Batches of one domain's rows through the core: (inputs, targets, positions, documents) of each."""
    core = _core.Streamer(
        domains=[(domain_key("a"), shards)], seq_len=seq_len, vocab_size=options.pop("vocab_size", 0), seed=3,
        batch_size=batch_size, micro_batches=1, world_size=1, rank=0,
        units=np.array([_core.WEIGHT_ONE], dtype=np.int64), threads=options.pop("threads", 1), **options,
    )  # fmt: skip
    shape = batch_size, seq_len
    inputs, targets = (TYPES[options.get(name, INT64)] for name in ("inputs", "targets"))
    try:
        for _ in range(steps):
            batch = np.empty(shape, inputs), np.empty(shape, targets), np.empty(shape, "i8"), np.empty(shape, "i4")
            asked = options.get("boundaries", _core.Boundaries.NONE) != _core.Boundaries.NONE
            core.submit(batch[0], batch[1], np.empty(batch_size, "i8"), *(batch[2:] if asked else ()))
            assert core.next() is not None
            yield batch
    finally:
        core.close()


def row_by_reference(tokens, pieces, seq_len, eot):
    """(inputs, targets, positions, documents) of one row."""
    slots = []
    for document, (token, count) in enumerate(pieces):
        piece = tokens[token : token + count].tolist()
        slots += [(piece[i], piece[i + 1], i, document) for i in range(count - 1)]
    slots += [(eot, -100, i, len(pieces)) for i in range(seq_len - len(slots))]
    return tuple(zip(*slots, strict=True))


def for_core(shard, packed):
    return shard.for_core() | {"packing": packed.path, "windows": packed.rows}


@given(
    corpus=corpora,
    inputs=st.sampled_from([INT64, INT32, UINT16]),
    targets=st.sampled_from([INT64, INT32]),
    dtype=st.sampled_from(["<u2", "<u4"]),
    mmap=st.booleans(),
    threads=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=40)
def test_rows_are_drawn_as_the_reference_writes_them(tmp_path, cache, corpus, inputs, targets, dtype, mmap, threads):
    """Two packed shards of one domain, one of them with an index of documents, for two epochs and a half."""
    seq_len, lengths = corpus
    shards = [write_documents(tmp_path / "a.bin", lengths, AFTER, dtype)]
    shards.append(write_documents(tmp_path / "b.bin", [*lengths[::-1], 3], INDEX, dtype))
    packed = [
        *pack_rows(shards[:1], seq_len, boundaries=AFTER, eot=EOT),
        *pack_rows(shards[1:], seq_len, boundaries=INDEX, eot=EOT),
    ]
    expected = [
        row_by_reference(np.fromfile(shard.path, dtype=dtype), pieces, seq_len, EOT)
        for shard, sidecar in zip(shards, packed, strict=True)
        for pieces in rows_of(sidecar.path)
    ]
    rows = len(expected)
    drawn = stream(
        [for_core(shard, sidecar) for shard, sidecar in zip(shards, packed, strict=True)],
        seq_len, 1, 2 * rows + rows // 2,
        inputs=inputs, targets=targets, mmap=mmap, threads=threads, boundaries=AFTER, eot=EOT,
    )  # fmt: skip
    for draw, batch in enumerate(drawn):
        row = expected[_core.permute(3, domain_key("a"), draw // rows, rows, draw % rows)]
        for got, want in zip(batch, row, strict=True):
            np.testing.assert_array_equal(got[0], want)


def test_packed_shards_and_windows_stand_side_by_side(tmp_path, cache):
    shard = write_documents(tmp_path / "a.bin", [20, 5, 8, 60, 31] * 4)
    tokens = np.fromfile(shard.path, dtype="<u2")
    [packed] = pack_rows([shard], 16, boundaries=AFTER, eot=EOT)
    windows = (len(tokens) - 1) // 16
    [batch] = stream(
        [for_core(shard, packed), shard.for_core() | {"windows": windows}], 16, packed.rows + windows, 1,
        boundaries=AFTER, eot=EOT,
    )  # fmt: skip
    expected = [row_by_reference(tokens, pieces, 16, EOT)[:2] for pieces in rows_of(packed.path)]
    expected += [(tokens[i : i + 16], tokens[i + 1 : i + 17]) for i in range(0, 16 * windows, 16)]
    assert sorted(np.hstack(batch[:2]).tolist()) == sorted(np.hstack(row).tolist() for row in expected)


def test_a_packed_row_with_an_id_outside_the_vocabulary_names_the_token(tmp_path, cache):
    shard = write_documents(tmp_path / "a.bin", [30] * 4)
    [packed] = pack_rows([shard], 29, boundaries=AFTER, eot=EOT)
    at = [pieces[0][0] for pieces in rows_of(packed.path)][2]
    tokens = np.fromfile(shard.path, dtype="<u2")
    tokens[at + 11] = 60_500
    tokens.tofile(shard.path)
    with pytest.raises(TokenError, match=rf"a\.bin.*60500.*token {at + 11} \(byte {2 * (at + 11)}\)"):
        list(stream([for_core(shard, packed)], 29, 4, 1, vocab_size=60_400))


def test_a_sidecar_damaged_or_swapped_under_a_reader_is_an_error(tmp_path, cache):
    shard = write_documents(tmp_path / "a.bin", [30] * 40)
    [packed] = pack_rows([shard], 29, boundaries=AFTER, eot=EOT)
    [other] = pack_rows([shard], 13, boundaries=AFTER, eot=EOT)
    with pytest.raises(ShardError, match=r"rows of 13 tokens.*pack it again"):
        list(stream([for_core(shard, other)], 29, 1, 1))
    drawn = stream([for_core(shard, packed)], 29, 1, 200, threads=0)
    next(drawn)
    with open(packed.path, "r+b") as sidecar:
        sidecar.seek(8 * HEADER)
        sidecar.write(b"\0" * 16 * packed.rows)
    with pytest.raises(ShardError, match=os.path.basename(packed.path)):
        list(drawn)
    os.truncate(packed.path, 100)
    with pytest.raises(ShardError, match=os.path.basename(packed.path)):
        list(stream([for_core(shard, packed)], 29, 1, 1))


@pytest.mark.parametrize(
    "options",
    [{"shared": True}, {"targets": UINT16}, {"inputs": UINT16, "eot": 1 << 16}],
    ids=["shared", "uint16", "eot"],
)
def test_formats_that_cannot_hold_packed_rows_are_refused(tmp_path, cache, options):
    shard = write_documents(tmp_path / "a.bin", [30] * 4)
    [packed] = pack_rows([shard], 29, boundaries=AFTER, eot=EOT)
    with pytest.raises(ValueError, match="packed rows"):
        next(stream([for_core(shard, packed)], 29, 1, 1, **options))
