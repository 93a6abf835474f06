"""Shards that mosaicml-streaming's MDSWriter wrote, read again, against its own StreamingDataset."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

from mixloader import Manifest, MixLoader
from mixloader.errors import ShardError
from mixloader.formats import open_shards, read_tokens
from mixloader.index import verify

pytestmark = [pytest.mark.filterwarnings("ignore")]

LENGTHS = np.random.default_rng(0).integers(1, 900, size=60)
DOCUMENTS = [np.random.default_rng(i).integers(1, 30_000, size=n) for i, n in enumerate(LENGTHS)]
TOKENS = np.concatenate(DOCUMENTS)
SIZE_LIMIT = 1 << 14


def write(folder: Path, columns: dict[str, str], samples, **options) -> Path:
    with MDSWriter(out=str(folder), columns=columns, size_limit=SIZE_LIMIT, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def all_tokens(shards) -> list[int]:
    return np.concatenate([read_tokens(shard) for shard in shards]).tolist()


@pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray:int32", "ndarray:uint32", "ndarray:int64", "ndarray"])
def test_arrays_of_any_length(tmp_path, encoding):
    dtype = encoding.partition(":")[2] or "int64"
    folder = write(tmp_path, {"tokens": encoding}, ({"tokens": d.astype(dtype)} for d in DOCUMENTS))
    shards = open_shards(folder)
    assert len(shards) > 1
    assert {shard.dtype for shard in shards} == {dtype}
    assert all_tokens(shards) == TOKENS.tolist()
    assert sum(shard.document_count for shard in shards) == len(DOCUMENTS)
    theirs = StreamingDataset(local=str(folder), batch_size=1)
    ours = [
        read_tokens(shard, start, end - start).tolist()
        for shard in shards
        for start, end in zip([0, *shard.extents.ends[:-1].tolist()], shard.extents.ends.tolist(), strict=True)
    ]
    assert ours == [theirs[i]["tokens"].tolist() for i in range(len(theirs))]


@pytest.mark.parametrize("dtype", ["int64", "uint16"])
def test_bytes_as_llm_foundry_writes_them(tmp_path, dtype):
    chunks = TOKENS[: len(TOKENS) // 129 * 129].reshape(-1, 129).astype(dtype)
    folder = write(tmp_path, {"tokens": "bytes"}, ({"tokens": chunk.tobytes()} for chunk in chunks))
    shards = open_shards(folder, dtype=None if dtype == "int64" else dtype)
    assert all_tokens(shards) == chunks.ravel().tolist()
    assert {shard.extents.tokens for shard in shards} == {129}
    theirs = StreamingDataset(local=str(folder), batch_size=1)
    assert all_tokens(shards)[129:258] == np.frombuffer(theirs[1]["tokens"], dtype=dtype).tolist()
    if dtype != "int64":
        with pytest.raises(ShardError, match=r"give (their )?dtype="):
            open_shards(folder)


def test_arrays_of_one_shape_are_one_run(tmp_path):
    chunks = TOKENS[: len(TOKENS) // 128 * 128].reshape(-1, 128).astype(np.uint16)
    shards = open_shards(write(tmp_path, {"tokens": "ndarray:uint16:128"}, ({"tokens": c} for c in chunks)))
    assert [shard.extents for shard in shards] == [None] * len(shards)
    assert all_tokens(shards) == chunks.ravel().tolist()


def test_other_columns_stand_before_and_after(tmp_path):
    columns = {"id": "int", "name": "str", "tokens": "ndarray:int32", "weird": "json"}
    samples = (
        {"id": i, "name": "x" * (i % 5), "tokens": d.astype(np.int32), "weird": {"a": [i]}}
        for i, d in enumerate(DOCUMENTS)
    )
    assert all_tokens(open_shards(write(tmp_path, columns, samples))) == TOKENS.tolist()


@pytest.mark.parametrize("compression", ["zstd", "zstd:7", "gz"])
def test_compressed_shards_with_their_digests(tmp_path, monkeypatch, compression):
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    folder = write(
        tmp_path / "data", {"tokens": "ndarray:uint16"}, ({"tokens": d.astype(np.uint16)} for d in DOCUMENTS),
        compression=compression, hashes=["sha1", "xxh64"],
    )  # fmt: skip
    shards = open_shards(folder)
    assert {shard.compression for shard in shards} == {{"z": "zstd", "g": "gzip"}[compression[0]]}
    for shard in shards:
        content = Path(shard.path).read_bytes()
        assert (shard.stored_bytes, shard.digest) == (len(content), f"sha1:{hashlib.sha1(content).hexdigest()}")
    assert all_tokens(shards) == TOKENS.tolist()
    manifest = Manifest.open({"a": folder})
    manifest.save(folder / "manifest.json")
    assert Manifest.open(folder) == manifest
    assert verify(folder) == ([], [])


@pytest.mark.parametrize("compression", ["br", "bz2", "snappy"])
def test_compressions_that_are_not_read_are_named(tmp_path, compression):
    folder = write(tmp_path, {"t": "ndarray:uint16"}, [{"t": np.arange(5, dtype=np.uint16)}], compression=compression)
    with pytest.raises(ShardError, match=f"compression {compression}; expected zstd or gz"):
        open_shards(folder)


def test_pickles_are_refused(tmp_path):
    folder = write(tmp_path, {"tokens": "pkl"}, [{"tokens": [1, 2]}])
    with pytest.raises(ShardError, match=r"tokens:pkl; of those that may hold tokens \(none\)"):
        open_shards(folder)


def test_the_core_streams_what_was_written(tmp_path):
    folder = write(tmp_path, {"tokens": "ndarray:uint16"}, ({"tokens": d.astype(np.uint16)} for d in DOCUMENTS))
    seq_len = 32
    expected = []
    for shard in open_shards(folder):
        windows = np.lib.stride_tricks.sliding_window_view(read_tokens(shard).astype(np.int64), seq_len + 1)[::seq_len]
        expected += windows.tolist()
    with MixLoader({"a": folder}, 1, seq_len, max_steps=len(expected)) as loader:
        rows = [np.hstack((b["input_ids"], b["targets"][:, -1:]))[0].tolist() for b in loader]
    assert sorted(rows) == sorted(expected)
