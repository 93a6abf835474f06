"""Shards that the programs write whose formats these are, read again: tokens, documents, and what their readers say."""

import sys

import numpy as np
import pytest

from mixloader.errors import ShardError
from mixloader.formats import Shard, open_shards, read_tokens
from mixloader.formats.source import Source
from mixloader.formats.tables import read_table

# These programs warn of many things that are no business of this test.
pytestmark = [pytest.mark.filterwarnings("ignore")]

LENGTHS = np.random.default_rng(0).integers(1, 900, size=60)
DOCUMENTS = [np.random.default_rng(i).integers(1, 50_000, size=n) for i, n in enumerate(LENGTHS)]
TOKENS = np.concatenate(DOCUMENTS)
STARTS = np.cumsum([0, *LENGTHS])


def starts_of(shard: Shard) -> list[int]:
    """Where documents begin, without 0 and the end."""
    assert shard.documents is not None
    table = shard.documents
    content = Source(table.path, None).read(table.offset, table.count * table.width)
    return [int(x) for x in read_table(table, content) if 0 < x < shard.tokens]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core(tmp_path, dtype):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    prefix = str(tmp_path / "text_document")
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    (shard,) = open_shards(prefix)
    assert (shard.format, shard.dtype, shard.document_count) == ("megatron", np.dtype(dtype).name, len(DOCUMENTS))
    assert read_tokens(shard).tolist() == TOKENS.tolist()
    assert starts_of(shard) == STARTS[1:-1].tolist()
    theirs = indexed_dataset.IndexedDataset(prefix)
    for i in (0, 7, 59):
        start = int(STARTS[i])
        assert read_tokens(shard, start, len(DOCUMENTS[i])).tolist() == theirs.get(i).tolist()


def test_megatron_core_documents_of_sentences(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    prefix = str(tmp_path / "text_sentence")
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for i in range(0, len(DOCUMENTS), 3):
        for sentence in DOCUMENTS[i : i + 3]:
            builder.add_item(sentence_tensor(sentence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    (shard,) = open_shards(prefix)
    assert shard.document_count == len(DOCUMENTS) // 3
    assert starts_of(shard) == STARTS[3:-1:3].tolist()
    assert read_tokens(shard).tolist() == TOKENS.tolist()


def sentence_tensor(tokens: np.ndarray):
    import torch

    return torch.from_numpy(tokens)


@pytest.mark.parametrize("token_size", [2, 4])
@pytest.mark.parametrize("metadata", [False, True])
def test_datatrove(tmp_path, token_size, metadata):
    tokenizer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    file = tokenizer.TokenizedFile(
        str(tmp_path), "00000_data.ds", save_index=True, save_final_metadata=metadata,
        tokenizer_name_or_path="gpt2", token_size=token_size,
    )  # fmt: skip
    for document in DOCUMENTS:
        file.write(document.tolist(), None)
    file.close()
    (shard,) = open_shards(tmp_path)
    assert (shard.format, shard.width, shard.document_count) == ("datatrove", token_size, len(DOCUMENTS))
    assert read_tokens(shard).tolist() == TOKENS.tolist()
    assert starts_of(shard) == STARTS[1:-1].tolist()


def _litdata_tokens(number: int):
    import torch

    yield torch.from_numpy(DOCUMENTS[number]).to(torch.int32 if number >= 0 else torch.int64)


@pytest.mark.skipif(sys.platform != "linux", reason="litData spawns processes")
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_litdata(tmp_path, monkeypatch, compression):
    litdata = pytest.importorskip("litdata")
    from litdata.streaming.item_loader import TokensLoader

    if compression:
        pytest.importorskip("zstd", reason="litData compresses with the package zstd")
        pytest.importorskip("zstandard")
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "chunks"
    litdata.optimize(
        fn=_litdata_tokens, inputs=list(range(len(DOCUMENTS))), output_dir=str(out), num_workers=1,
        chunk_size=8192, item_loader=TokensLoader(), compression=compression,
        compression_level="chunk" if compression else None,
    )  # fmt: skip
    shards = open_shards(out)
    assert len(shards) > 1
    assert {(shard.format, shard.dtype, shard.compression) for shard in shards} == {("litdata", "int32", compression)}
    assert np.concatenate([read_tokens(shard) for shard in shards]).tolist() == TOKENS.tolist()
    assert sum(shard.document_count for shard in shards) == len(DOCUMENTS)
    ends = np.cumsum([shard.tokens for shard in shards])
    found = [start + end - shard.tokens for shard, end in zip(shards, ends, strict=True) for start in starts_of(shard)]
    assert sorted({*found, *ends.tolist()}) == STARTS[1:].tolist()
    block = 128
    theirs = litdata.StreamingDataset(str(out), item_loader=TokensLoader(block_size=block), shuffle=False)
    blocks = [
        read_tokens(shard, start, block).tolist()
        for shard in shards
        for start in range(0, shard.tokens - block + 1, block)
    ]
    assert [theirs[i].tolist() for i in range(len(theirs))] == blocks


def test_litdata_of_other_things_is_refused(tmp_path):
    litdata = pytest.importorskip("litdata")
    out = tmp_path / "chunks"
    litdata.optimize(fn=_litdata_item, inputs=[1, 2, 3], output_dir=str(out), num_workers=1, chunk_size=2)
    with pytest.raises(ShardError, match=r"item_loader PyTreeLoader; expected TokensLoader"):
        open_shards(out)


def _litdata_item(number: int):
    return {"number": number, "tokens": DOCUMENTS[number]}


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_numpy(tmp_path, dtype):
    np.save(tmp_path / "a.npy", TOKENS.astype(dtype))
    (shard,) = open_shards(tmp_path)
    assert read_tokens(shard).tolist() == TOKENS.tolist() == np.load(tmp_path / "a.npy").tolist()
    raw = np.memmap(tmp_path / "b.npy", mode="w+", dtype=dtype, shape=TOKENS.shape)  # as OLMo and dolma write theirs
    raw[:] = TOKENS
    raw.flush()
    (shard,) = open_shards(tmp_path / "b.npy", dtype=dtype)
    assert read_tokens(shard).tolist() == TOKENS.tolist()
