"""Each format read against bytes written after its description; damage of every kind refused with a sentence."""

import gzip
import json
import os
import struct
from pathlib import Path

import foreign
import numpy as np
import pytest
from corpora import tagged, write_llmc, write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from mixloader import MixLoader, remote
from mixloader.errors import ManifestError, MixLoaderError, ShardError
from mixloader.formats import FORMATS, Shard, open_shard, open_shards, read_tokens
from mixloader.formats.source import Source
from mixloader.formats.tables import read_table
from mixloader.manifest import Domain, Manifest

DOCUMENTS = [np.arange(start, start + n) for start, n in ((0, 7), (100, 1), (200, 300), (600, 12), (700, 80))]
TOKENS = np.concatenate(DOCUMENTS)
STARTS = np.cumsum([0, *map(len, DOCUMENTS[:-1])]).tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Tables that a shard has no file for."""
    monkeypatch.setenv("MIXLOADER_CACHE", str(tmp_path / "cache"))


def starts_of(shard: Shard) -> list[int]:
    """The tokens at which a shard's documents begin, 0 left out or not, and what lies past its end."""
    assert shard.documents is not None
    table = shard.documents
    return read_table(table, Source(table.path, None).read(table.offset, table.count * table.width)).tolist()


def npy(path: Path, tokens: np.ndarray, version: tuple[int, int] = (1, 0)) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array(file, tokens, version=version)
    return path


def mds(folder: Path, encoding: str = "ndarray:uint16", documents=DOCUMENTS, dtype="uint16") -> Path:
    samples = [{"tokens": foreign.little(d, dtype)} for d in documents]
    return foreign.write_mds(folder, [samples[:3], samples[3:]], {"tokens": encoding})


# What is read


def test_megatron_gives_tokens_and_documents(tmp_path):
    for dtype in ("uint16", "int32"):
        path = foreign.write_megatron(tmp_path / dtype, DOCUMENTS, dtype)
        shard = open_shard(path)
        assert (shard.format, shard.dtype, shard.offset, shard.tokens) == ("megatron", dtype, 0, len(TOKENS))
        assert shard.document_count == len(DOCUMENTS)
        assert starts_of(shard) == STARTS
        assert shard.documents.path == str(path.with_suffix(".idx"))  # no table of our own
        assert read_tokens(shard).tolist() == TOKENS.tolist()
        assert open_shard(path.with_suffix(".idx")) == open_shard(tmp_path / dtype) == shard


def test_megatron_documents_of_several_sequences(tmp_path):
    path = foreign.write_megatron(tmp_path / "a", DOCUMENTS, indices=[0, 2, 5])
    shard = open_shard(path)
    assert shard.document_count == 2
    assert starts_of(shard) == [0, STARTS[2]]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("metadata", [False, True])
def test_datatrove_says_its_width_by_its_index_or_metadata(tmp_path, dtype, metadata):
    path = foreign.write_datatrove(tmp_path / "00000_x.ds", DOCUMENTS, dtype, metadata=metadata)
    shard = open_shard(path)
    assert (shard.format, shard.dtype, shard.tokens, shard.document_count) == ("datatrove", dtype, len(TOKENS), 5)
    assert starts_of(shard) == [*STARTS[1:], len(TOKENS)]
    assert read_tokens(shard).tolist() == TOKENS.tolist()


def test_datatrove_without_index_or_metadata(tmp_path):
    path = foreign.write_datatrove(tmp_path / "a.ds", DOCUMENTS, index=False)
    assert (open_shard(path).documents, open_shard(path).dtype) == (None, "uint16")
    assert open_shard(path, dtype="uint32").tokens == len(TOKENS) // 2


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8", "|u1"])
def test_npy_as_numpy_writes_it(tmp_path, version, dtype):
    tokens = (TOKENS % 250).astype(dtype)
    shard = open_shard(npy(tmp_path / "a.npy", tokens, version))
    assert (shard.format, shard.tokens) == ("npy", len(tokens))
    assert read_tokens(shard).tolist() == tokens.tolist()
    assert shard == open_shard(tmp_path / "a.npy", dtype=tokens.dtype.name)


def test_npy_of_rows_and_olmo_files_without_a_header(tmp_path):
    rows = open_shard(npy(tmp_path / "rows.npy", TOKENS.reshape(4, -1).astype("<u2")))
    assert read_tokens(rows).tolist() == TOKENS.tolist()
    write_raw(tmp_path / "olmo.npy", TOKENS.astype("<u4"))
    olmo = open_shard(tmp_path / "olmo.npy", dtype="uint32")
    assert (olmo.format, olmo.offset, olmo.tokens) == ("npy", 0, len(TOKENS))


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [("ndarray:uint16", "uint16"), ("ndarray:int32", "int32"), ("ndarray", "uint32"), ("bytes", "int64")],
)
def test_mds_samples_of_any_length_are_documents(tmp_path, encoding, dtype):
    shards = open_shards(mds(tmp_path / "mds", encoding, dtype=dtype))
    assert [(s.format, s.dtype, s.document_count) for s in shards] == [("mds", dtype, 3), ("mds", dtype, 2)]
    assert all(shard.extents_are_documents for shard in shards)
    assert np.concatenate([read_tokens(s) for s in shards]).tolist() == TOKENS.tolist()
    ends = shards[0].extents.ends.tolist()
    assert ends == np.cumsum([len(d) for d in DOCUMENTS[:3]]).tolist()
    assert open_shard(tmp_path / "mds" / "shard.00001.mds") == shards[1]


@pytest.mark.parametrize(
    ("encoding", "is_run"), [("ndarray:uint16", False), ("ndarray:uint16:64", True), ("bytes", False)]
)
def test_mds_samples_of_one_length_are_extents_of_one_size(tmp_path, encoding, is_run):
    chunks = TOKENS[:384].reshape(6, 64).astype("<u2")
    sizes = {"tokens": 128} if is_run else {}
    folder = foreign.write_mds(tmp_path, [[{"tokens": c} for c in chunks]], {"tokens": encoding}, sizes)
    (shard,) = open_shards(folder, dtype="uint16")
    if is_run:
        assert shard.extents is None
    else:
        assert (shard.extents.tokens, shard.extents.ends) == (64, None)
    assert not shard.extents_are_documents
    assert read_tokens(shard).tolist() == chunks.ravel().tolist()


def test_mds_with_other_columns_before_and_after(tmp_path):
    samples = [
        {
            "a_text": b"x" * (i * 3 % 7),
            "b_fixed": b"12345678",
            "tokens": foreign.little(d, "uint16"),
            "z": b"\x80pickled",
        }
        for i, d in enumerate(DOCUMENTS)
    ]
    columns = {"a_text": "str", "b_fixed": "int", "tokens": "ndarray:uint16", "z": "pkl"}
    (shard,) = open_shards(foreign.write_mds(tmp_path, [samples], columns, {"b_fixed": 8}))
    assert read_tokens(shard).tolist() == TOKENS.tolist()


def test_mds_with_two_candidates_asks_for_the_column(tmp_path):
    samples = [{"ids": foreign.little(d, "uint16"), "mask": foreign.little(d % 2, "uint8")} for d in DOCUMENTS]
    folder = foreign.write_mds(tmp_path, [samples], {"ids": "ndarray:uint16", "mask": "ndarray:uint8"})
    with pytest.raises(ShardError, match=r"those that may hold tokens \(ids, mask\) exactly one.*column="):
        open_shards(folder)
    assert read_tokens(open_shards(folder, column="ids")[0]).tolist() == TOKENS.tolist()
    assert open_shards(folder, column="mask")[0].dtype == "uint8"
    with pytest.raises(ShardError, match=r"no column 'x'; its columns are ids, mask"):
        open_shards(folder, column="x")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_litdata_gives_tokens_and_items(tmp_path, dtype):
    shards = open_shards(foreign.write_litdata(tmp_path, [DOCUMENTS[:3], DOCUMENTS[3:]], dtype))
    assert [(s.format, s.dtype, s.document_count) for s in shards] == [("litdata", dtype, 3), ("litdata", dtype, 2)]
    assert starts_of(shards[0]) == STARTS[:3]
    assert np.concatenate([read_tokens(s) for s in shards]).tolist() == TOKENS.tolist()


@pytest.mark.parametrize("format", ["nanogpt", "llmc", "npy", "datatrove", "megatron"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_of_every_format(tmp_path, format, suffix):
    path = {
        "nanogpt": lambda: write_raw(tmp_path / "a.bin", TOKENS.astype("<u2")),
        "llmc": lambda: write_llmc(tmp_path / "a.bin", TOKENS.astype("<u4")),
        "npy": lambda: npy(tmp_path / "a.npy", TOKENS.astype("<u2")),
        "datatrove": lambda: foreign.write_datatrove(tmp_path / "a.ds", DOCUMENTS),
        "megatron": lambda: foreign.write_megatron(tmp_path / "a", DOCUMENTS),
    }[format]()
    plain, content = open_shard(path), path.read_bytes()
    packed = gzip.compress(content) if suffix == ".gz" else pytest.importorskip("zstandard").compress(content)
    path.unlink()
    path = Path(f"{path}{suffix}")
    path.write_bytes(packed)
    shard = open_shard(path)
    assert (shard.format, shard.tokens, shard.bytes, shard.offset) == (
        plain.format, plain.tokens, plain.bytes, plain.offset,
    )  # fmt: skip
    assert (shard.compression, shard.stored_bytes) == ({".gz": "gzip", ".zst": "zstd"}[suffix], len(packed))
    assert shard.document_count == plain.document_count
    assert (shard.for_core()["path"], shard.for_core()["name"]) == ("", str(path))
    assert read_tokens(shard, 3, 50).tolist() == TOKENS[3:53].tolist()
    path.write_bytes(packed[:-9])
    with pytest.raises(ShardError):
        read_tokens(open_shard(path))


def test_remote_files_are_opened_by_ranges(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    foreign.write_megatron(tmp_path / "a", DOCUMENTS)
    for path in (tmp_path / "a.bin", tmp_path / "a.idx"):
        files.pipe_file(f"/formats/{path.name}", path.read_bytes())
    shard = open_shard("memory://formats/a.bin")
    assert (shard.format, shard.tokens, shard.document_count) == ("megatron", len(TOKENS), len(DOCUMENTS))
    assert starts_of(shard) == STARTS
    assert not shard.is_ready
    assert read_tokens(shard, 5, 9).tolist() == TOKENS[5:14].tolist()
    with pytest.raises(ShardError, match=r"none\.bin does not exist"):
        open_shard("memory://formats/none.bin")


@settings(max_examples=60)
@given(data=st.data())
def test_any_part_of_any_extents_reads_as_numpy_slices(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=12))
    if data.draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    tokens = np.arange(sum(lengths)).astype("<u2")
    samples = [{"tokens": part} for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    folder = foreign.write_mds(tmp_path_factory.mktemp("mds"), [samples], {"tokens": "ndarray:uint16"})
    (shard,) = open_shards(folder)
    start = data.draw(st.integers(0, len(tokens)))
    count = data.draw(st.integers(0, len(tokens) - start))
    assert read_tokens(shard, start, count).tolist() == tokens[start : start + count].tolist()


# Which format


def test_a_folder_gives_its_files_by_name(tmp_path):
    write_raw(tmp_path / "b.bin", TOKENS.astype("<u2"))
    write_llmc(tmp_path / "a.bin", tagged(0, 50))
    foreign.write_megatron(tmp_path / "c", DOCUMENTS)
    foreign.write_datatrove(tmp_path / "d.ds", DOCUMENTS)
    npy(tmp_path / "e.npy", TOKENS.astype("<u4"))
    (tmp_path / "README.md").write_text("not tokens")
    (tmp_path / "f.bin").mkdir()
    formats = [shard.format for shard in open_shards(tmp_path)]
    assert formats == ["llmc", "nanogpt", "megatron", "datatrove", "npy"]
    assert open_shards(tmp_path / "f.bin") == ()


def test_a_format_can_be_said(tmp_path):
    write_llmc(tmp_path / "a.bin", tagged(0, 50))
    assert open_shard(tmp_path / "a.bin", format="nanogpt", dtype="uint32").tokens == 256 + 50
    with pytest.raises(
        ManifestError, match=r"unknown shard format 'parquet'; known formats are mds, litdata, megatron"
    ):
        open_shard(tmp_path / "a.bin", format="parquet")
    with pytest.raises(ManifestError, match="format llmc, which has no columns"):
        open_shards(tmp_path / "a.bin", column="tokens")
    with pytest.raises(ShardError, match="holds uint32 tokens by its header, but uint16 was asked for"):
        open_shards(tmp_path / "a.bin", dtype="uint16")


# What is refused


def _lie(path: Path, at: int, form: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, value)
    path.write_bytes(content)


N = len(DOCUMENTS)
MEGATRON_LIES = [
    (0, "<B", 0, "begins with .*; it is no Megatron index"),
    (9, "<Q", 2, "Megatron index of version 2; expected 1"),
    (17, "<B", 7, "tokens are float32; expected one of"),
    (17, "<B", 99, r"tokens are unknown \(code 99\)"),
    (18, "<Q", 1 << 63, "9223372036854775808 sequences .* truncated or is damaged"),
    (18, "<Q", N + 1, "was truncated or is damaged"),
    (26, "<Q", (1 << 64) - 1, "was truncated or is damaged"),
    (34, "<i", -1, "negative length or that do not follow"),
    (34, "<i", 8, "do not follow each other"),
    (34 + 4 * N, "<q", 2, "do not follow each other"),
    (34 + 4 * N + 8, "<q", -14, "do not follow each other"),
    (34 + 4 * (N - 1), "<i", 79, "accounts for 798; it was truncated, or the index belongs"),
    (34 + 12 * N + 8, "<q", -1, "document indices that decrease"),
    (34 + 12 * N + 8 * N, "<q", N + 1, "document indices that decrease or lie beyond its 5"),
]


@pytest.mark.parametrize(("at", "form", "value", "message"), MEGATRON_LIES)
def test_a_megatron_index_that_lies_is_refused(tmp_path, at, form, value, message):
    path = foreign.write_megatron(tmp_path / "a", DOCUMENTS)
    _lie(tmp_path / "a.idx", at, form, value)
    with pytest.raises(ShardError, match=message):
        open_shard(path, format="megatron")


def test_megatron_without_its_other_half(tmp_path):
    path = foreign.write_megatron(tmp_path / "a", DOCUMENTS)
    (tmp_path / "a.idx").rename(tmp_path / "b.idx")
    with pytest.raises(ShardError, match=r"has no a\.idx beside it"):
        open_shard(path, format="megatron")
    with pytest.raises(ShardError, match=r"has no b\.bin beside it"):
        open_shard(tmp_path / "b.idx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ds.index", np.array([7, 5, 400], "<u8").tobytes(), "ends that decrease"),
        ("a.ds.index", np.array([7, 399], "<u8").tobytes(), "has 800 bytes, but 399 uint16 tokens were expected"),
        ("a.ds.index", np.array([1 << 63], "<u8").tobytes(), "9223372036854775808 uint16 tokens were expected"),
        ("a.ds.index", b"1234567", "no whole number of uint64"),
        ("a.ds.metadata", b"gpt2|3\n400\n", "says 3 bytes a token; expected 2 or 4"),
        ("a.ds.metadata", b"gpt2\n400\n", "does not begin with"),
        ("a.ds.metadata", b"\xff\xfe|2\n400\n4", None),
        ("a.ds.metadata", b"gpt2|2\n401\n", r"ends at token 400, but .*says 401 tokens"),
    ],
)
def test_a_datatrove_sidecar_that_lies_is_refused(tmp_path, name, content, message):
    path = foreign.write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    assert len(TOKENS) == 400
    (tmp_path / name).write_bytes(content)
    if message is None:
        assert open_shard(path).tokens == 400
        return
    with pytest.raises(ShardError, match=message):
        open_shard(path)


def _npy_header(text: str, version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode() + bytes(100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (25,)}"), "'<f4'; expected one of uint8"),
        (_npy_header("{'descr': '>u2', 'fortran_order': False, 'shape': (50,)}"), "'>u2'; .*little-endian"),
        (_npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (50,)}"), "'|O'; expected one of"),
        (_npy_header("{'descr': 'gibberish', 'fortran_order': False, 'shape': (50,)}"), "unknown NumPy dtype"),
        (_npy_header("{'descr': '<u2', 'fortran_order': True, 'shape': (5, 10)}"), "Fortran order"),
        (_npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (51,)}"), "announces 51 uint16 tokens"),
        (_npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-50,)}"), r"shape \(-50,\)"),
        (_npy_header(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({2**63},)}}"), f"announces {2**63} "),
        (_npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (0,)}"), "it is empty"),
        (_npy_header("{'descr': '<u2', 'shape': (50,)}"), "header that cannot be read"),
        (_npy_header("__import__('os').system('true')"), "header that cannot be read"),
        (_npy_header("[" * 5000), "header that cannot be read"),
        (_npy_header("{}", b"\4\0"), "version 4.0; expected 1.0, 2.0 or 3.0"),
        (b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 31) + bytes(100), "header of 2147483648 bytes"),
        (b"\x93NUMPY\1\0", "ends within its NumPy header"),
        (b"\x93NUM", "ends within its NumPy header"),
        (b"\x93NUMPY\1\0\x76\0{", "ends within its NumPy header"),
    ],
)
def test_a_numpy_header_that_lies_is_refused(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ShardError, match=message):
        open_shard(tmp_path / "a.npy")


MDS_LIES = [
    (0, "<I", (1 << 32) - 1, "does not begin with its number of samples"),
    (4, "<I", 0, "offsets that decrease"),
    (8, "<I", 4, "offsets that decrease"),
    (4 + 4 * 3, "<I", (1 << 32) - 1, "offsets that decrease, or do not end"),
]


@pytest.mark.parametrize(("at", "form", "value", "message"), MDS_LIES)
def test_an_mds_shard_that_lies_is_refused(tmp_path, at, form, value, message):
    _lie(mds(tmp_path) / "shard.00000.mds", at, form, value)
    with pytest.raises(ShardError, match=message):
        open_shards(tmp_path)


def _sample(folder: Path, number: int) -> int:
    """The byte at which a sample of the first shard begins."""
    return struct.unpack_from("<I", (folder / "shard.00000.mds").read_bytes(), 4 + 4 * number)[0]


def test_mds_arrays_that_lie_are_refused(tmp_path):
    folder = mds(tmp_path / "a")
    _lie(folder / "shard.00000.mds", _sample(folder, 1) + 4, "<B", (2 << 2) | 0)
    with pytest.raises(ShardError, match="other than one dimension"):
        open_shards(folder)
    folder = mds(tmp_path / "b", "ndarray")
    _lie(folder / "shard.00000.mds", _sample(folder, 1) + 4, "<B", 34)
    with pytest.raises(ShardError, match=r"types \[16, 34\] as MDS numbers them"):
        open_shards(folder)
    folder = mds(tmp_path / "c")
    _lie(folder / "shard.00000.mds", _sample(folder, 1) + 4, "<B", (1 << 2) | 1)
    with pytest.raises(ShardError, match="no whole number of uint16 tokens"):
        open_shards(folder)


def test_mds_bytes_of_another_dtype_are_noticed(tmp_path):
    samples = [{"tokens": foreign.little(np.arange(64) + 1, "uint16").tobytes()}]
    folder = foreign.write_mds(tmp_path, [samples], {"tokens": "bytes"})
    with pytest.raises(ShardError, match=r"int64 by default, but one of its tokens would be \d+; give their dtype="):
        open_shards(folder)
    assert read_tokens(open_shards(folder, dtype="uint16")[0]).tolist() == list(range(1, 65))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "has version 1; expected 2"),
        ({"format": "json"}, "has format 'json'; expected 'mds'"),
        ({"samples": 1 << 40}, "cannot hold the 1099511627776 samples"),
        ({"samples": 2}, "does not begin with its number of samples, 2"),
        ({"samples": -3}, "samples at .* is -3; the index is damaged"),
        ({"samples": True}, "is True; the index is damaged"),
        ({"column_encodings": ["pkl"]}, r"tokens:pkl; of those that may hold tokens \(none\)"),
        ({"column_encodings": ["ndarray:float32"]}, "that may hold tokens"),
        ({"column_encodings": []}, "does not say of each column"),
        ({"column_sizes": ["8"]}, "does not say of each column"),
        ({"column_sizes": [1 << 40]}, "columns that reach beyond their sample"),
        ({"raw_data": {"basename": "../shard.00000.mds", "bytes": 5}}, "lies outside its folder"),
        ({"raw_data": {"basename": "/etc/passwd", "bytes": 5}}, "lies outside its folder"),
        ({"raw_data": {"basename": "a\0b", "bytes": 5}}, "lies outside its folder"),
        ({"raw_data": {"basename": "none.mds", "bytes": 5}}, "does not exist"),
        ({"raw_data": {"basename": "shard.00000.mds", "bytes": 5}}, "says 5; it was truncated or replaced"),
        ({"raw_data": None}, "raw_data at .* is None"),
    ],
)
def test_an_mds_index_that_lies_is_refused(tmp_path, changes, message):
    foreign.write_mds(
        tmp_path, [[{"tokens": foreign.little(d, "uint16")} for d in DOCUMENTS]], {"tokens": "ndarray:uint16"}
    )
    content = json.loads((tmp_path / "index.json").read_text())
    content["shards"][0].update(changes)
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=message):
        open_shards(tmp_path)


def test_pickled_columns_are_refused_by_name(tmp_path):
    folder = foreign.write_mds(tmp_path, [[{"tokens": b"cos\nsystem\n"}]], {"tokens": "pkl"})
    with pytest.raises(ShardError, match=r"'tokens' .* encoding 'pkl'; .*\(what is pickled is never read\)"):
        open_shards(folder, column="tokens")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data_format": ["no_header_tensor:1"]}, "expected one array of integers without a header"),
        ({"data_format": ["pickle"]}, "expected one array of integers"),
        ({"data_format": []}, "expected one array of integers"),
        ({"item_loader": "PyTreeLoader"}, "item_loader PyTreeLoader; expected TokensLoader"),
        ({"encryption": {"algorithm": "fernet"}}, "are encrypted"),
        ({"compression": "lz4"}, "compression lz4 by None; expected zstd"),
        ({"compression": "zstd", "compression_level": "batch"}, "expected zstd of whole chunks"),
    ],
)
def test_a_litdata_index_of_something_else_is_refused(tmp_path, config, message):
    with pytest.raises(ShardError, match=message):
        open_shards(foreign.write_litdata(tmp_path, [DOCUMENTS], **config))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 4, "does not begin with its 5 items"),
        (4, 0, "does not begin with"),
        (8, 1 << 31, "ascending offsets"),
        (8, 29 + 14, "ascending offsets"),
        (4 + 4 * N, 9, "ascending offsets of them up to"),
    ],
)
def test_a_litdata_chunk_that_lies_is_refused(tmp_path, at, value, message):
    folder = foreign.write_litdata(tmp_path, [DOCUMENTS])
    _lie(folder / "chunk-0-0.bin", at, "<I", value)
    with pytest.raises(ShardError, match=message):
        open_shards(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shards": 5}', '{"chunks": [5]}', "\x00", "[" * 100_000])
def test_what_is_no_index_is_refused(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ShardError, match=r"index\.json"):
        open_shards(tmp_path)


def _whole(folder: Path, format: str) -> Path:
    """A data set of a format, at the path that opens it."""
    return {
        "megatron": lambda: foreign.write_megatron(folder / "a", DOCUMENTS),
        "datatrove": lambda: foreign.write_datatrove(folder / "a.ds", DOCUMENTS, metadata=True),
        "npy": lambda: npy(folder / "a.npy", TOKENS.astype("<u2")),
        "llmc": lambda: write_llmc(folder / "a.bin", TOKENS.astype("<u4")),
        "mds": lambda: mds(folder),
        "litdata": lambda: foreign.write_litdata(folder, [DOCUMENTS]),
    }[format]()


def opened_or_refused(path: Path, format: str) -> tuple[Shard, ...] | None:
    """The shards, or None after an error that names the file."""
    try:
        return open_shards(path, format=format)
    except MixLoaderError as caught:
        error = caught
    assert str(path.parent) in str(error)
    return None


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"nanogpt"}))
@settings(max_examples=60)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused_or_gives_what_was_written(tmp_path_factory, format, data):
    folder = tmp_path_factory.mktemp(format)
    path = _whole(folder, format)
    victim = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file())))
    content = victim.read_bytes()
    victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    shards = opened_or_refused(path, format)
    if shards is None:
        return
    assert np.concatenate([read_tokens(shard) for shard in shards]).tolist() == TOKENS.tolist()


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"nanogpt"}))
@settings(max_examples=100)
@given(data=st.data())
def test_flipped_bytes_end_in_an_error_or_in_shards_within_their_files(tmp_path_factory, format, data):
    folder = tmp_path_factory.mktemp(format)
    path = _whole(folder, format)
    victim = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.is_file())))
    content = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    for shard in opened_or_refused(path, format) or ():
        assert len(read_tokens(shard)) == shard.tokens


@pytest.mark.parametrize("name", ["a.bin", "a.idx", "a.ds", "a.npy", "a.mds", "index.json", "a.bin.gz", "a.ds.index"])
def test_no_pipe_is_waited_for(tmp_path, name):
    if name == "a.ds.index":
        foreign.write_datatrove(tmp_path / "a.ds", DOCUMENTS, index=False)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ShardError, match=r"not a regular file|beside it"):
        open_shard(tmp_path / name.removesuffix(".index"))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write_raw(tmp_path / "a.bin", TOKENS.astype("<u2"))

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mixloader.formats.source.open", refuse, raising=False)
    with pytest.raises(ShardError, match=r"cannot open shard .*a\.bin: .*Permission denied"):
        open_shard(path)


def test_a_query_is_no_part_of_a_urls_name(monkeypatch):
    monkeypatch.setattr(remote, "size", lambda url: 200)
    monkeypatch.setattr(remote, "exists", lambda url: False)
    monkeypatch.setattr(remote, "read_range", lambda url, start, count: bytes(range(1, count + 1)))
    (shard,) = open_shards("http://h/a/l_val.bin?sig=a/b.zst")
    assert (shard.format, shard.tokens, shard.compression) == ("nanogpt", 100, None)
    source = Source("https://h/a/l.bin.zst?sig=a/b")
    assert (source.name, source.compression, source.beside("l.idx")) == ("l.bin", "zstd", "https://h/a/l.idx?sig=a/b")
    manifest = Manifest((Domain("a", (shard,)),))
    assert manifest.roots_outside("/data/manifest.json") == ["http://h/a"]
    with pytest.raises(ManifestError, match="holds a shard out"):
        Manifest.open({"a": shard.path})
    assert Source("s3://b/what?.bin", None).name == "what?.bin"


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("a.bin", struct.pack("<I", 20240520 ^ 1 << 30), "nearly llm.c's magic number; it is damaged"),
        ("a.bin", struct.pack("<I", 20240801 ^ 9), "nearly llm.c's magic number; it is damaged"),
        ("a.bin", struct.pack("<I", 20240522), "examples for evaluation"),
        ("a.npy", b"\x93NUMPX", "nearly NumPy's"),
        ("a.txt", b"some text", "does not say that it holds tokens; .* give format="),
        ("a.parquet", b"PAR1", "does not say that it holds tokens"),
        ("a.npz", b"PK", "does not say that it holds tokens"),
    ],
)
def test_what_is_hardly_bare_tokens_is_refused(tmp_path, name, start, message):
    path = tmp_path / name
    path.write_bytes(start.ljust(2048, b"\1"))
    with pytest.raises(ShardError, match=message):
        open_shards(path)
    assert open_shards(path, format="nanogpt")[0].tokens == 1024


@pytest.mark.parametrize("start", [b"MMIDIDX\0\1".ljust(100, b"\0"), b"MMIDIDX\0\0", b"x"])
def test_a_damaged_megatron_index_is_not_passed_over(tmp_path, start):
    path = foreign.write_megatron(tmp_path / "a", DOCUMENTS)
    path.with_suffix(".idx").write_bytes(start)
    with pytest.raises(ShardError, match=r"a\.idx (has|begins with) .*(it was truncated|it is no Megatron index)"):
        open_shards(path)
    assert open_shards(path, format="nanogpt")[0].documents is None


@pytest.mark.parametrize("tokens", [np.r_[5, 0, np.arange(1, 63)], np.zeros(64)])
def test_mds_bytes_are_looked_at_beyond_their_first_token(tmp_path, tokens):
    samples = [{"tokens": foreign.little(tokens, "int32").tobytes()}]
    folder = foreign.write_mds(tmp_path, [samples], {"tokens": "bytes"})
    with pytest.raises(ShardError, match=r"int64 by default, but .* give their dtype="):
        open_shards(folder)
    assert open_shards(folder, dtype="int32")[0].tokens == 64


@pytest.mark.parametrize("digits", ["²", "1" * 5000])
def test_odd_digits_in_a_litdata_index_are_refused(tmp_path, digits):
    foreign.write_litdata(tmp_path, [DOCUMENTS], data_format=[f"no_header_tensor:{digits}"])
    with pytest.raises(ShardError, match="has data_format"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "count"), [("ndarray:uint16", 20), ("ndarray:uint16:50", 20), ("ndarray:uint16", 1)]
)
def test_mds_samples_of_one_length_are_documents_on_request(tmp_path, encoding, count):
    samples = [{"tokens": foreign.little(np.arange(50) + i, "uint16")} for i in range(count)]
    sizes = {"tokens": 100} if encoding.endswith("50") else None
    folder = foreign.write_mds(tmp_path / "mds", [samples], {"tokens": encoding}, sizes)
    assert open_shards(folder)[0].document_count is None
    data = {"a": {"path": folder, "documents": "samples"}}
    manifest = Manifest.open(data)
    (shard,) = manifest.domains[0].shards
    assert (shard.document_count, shard.extents_are_documents) == (count, True)
    assert read_tokens(shard).tolist() == np.concatenate([s["tokens"] for s in samples]).tolist()
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    with MixLoader(tmp_path / "manifest.json", 1, 30, documents="index", shuffle=False) as loader:
        assert next(loader)["position_ids"][0].tolist() == [*range(30)]
        if count > 1:
            assert next(loader)["position_ids"][0].tolist() == [*range(20), *range(10)]
    with pytest.raises(ManifestError, match="expected 'samples' or none"):
        open_shards(folder, documents="rows")
    with pytest.raises(ManifestError, match="format nanogpt, which has no samples"):
        open_shards(write_raw(tmp_path / "a.bin", tagged(0, 5)), documents="samples")
