"""Shards in the formats of other programs, written byte by byte after their descriptions, without mixloader's code."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEGATRON_CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
LITDATA_CODES = {"uint8": 11, "int16": 14, "int32": 16, "int64": 18, "uint16": 20}
MDS_CODES = {"uint8": 8, "uint16": 16, "int16": 17, "uint32": 32, "int32": 33, "uint64": 64, "int64": 65}


def little(tokens: Any, dtype: str) -> np.ndarray:
    return np.asarray(tokens).astype(np.dtype(dtype).newbyteorder("<"))


def write_megatron(
    stem: Path, sequences: Sequence[np.ndarray], dtype: str = "uint16", *, indices: Sequence[int] | None = None
) -> Path:
    """stem.bin and stem.idx; indices: sequences that begin documents, and the end; by default each is one."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    parts = [little(s, dtype) for s in sequences]
    indices = list(range(len(parts) + 1)) if indices is None else list(indices)
    ends = np.cumsum([0, *(part.nbytes for part in parts)])
    stem.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in parts))
    stem.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(parts), len(indices))
        + np.array([len(part) for part in parts], dtype="<i4").tobytes()
        + ends[:-1].astype("<i8").tobytes()
        + np.array(indices, dtype="<i8").tobytes()
    )
    return stem.with_suffix(".bin")


def write_datatrove(
    path: Path, documents: Sequence[np.ndarray], dtype: str = "uint16", *, index: bool = True, metadata: bool = False
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(little(d, dtype).tobytes() for d in documents))
    ends = np.cumsum([len(d) for d in documents])
    if index:
        Path(f"{path}.index").write_bytes(ends.astype("<u8").tobytes())
    if metadata:
        Path(f"{path}.metadata").write_text(f"some|tokenizer|{np.dtype(dtype).itemsize}\n{ends[-1]}\n1.2 KT")
    return path


def mds_payload(encoding: str, tokens: np.ndarray) -> bytes:
    """The bytes of one column of a sample."""
    kind, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    values = tokens.tobytes()
    if kind == "bytes" or shape:
        return values
    size = next(i for i in range(4) if len(tokens) < 1 << (8 << i))
    head = bytes([(1 << 2) | size]) + len(tokens).to_bytes(1 << size, "little")
    return (b"" if dtype else bytes([MDS_CODES[tokens.dtype.name]])) + head + values


def write_mds(
    folder: Path,
    shards: Sequence[Sequence[dict[str, Any]]],
    columns: dict[str, str],
    sizes: dict[str, int] | None = None,
    **options: Any,
) -> Path:
    """A folder of MDS shards. shards: samples by column, arrays (encoded here) or bytes. sizes: of fixed columns."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(columns)
    fixed = {name: (sizes or {}).get(name) for name in names}
    config = {
        "version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 26,
        "column_names": names, "column_encodings": [columns[n] for n in names],
        "column_sizes": [fixed[n] for n in names],
    }  # fmt: skip
    entries = []
    for number, samples in enumerate(shards):
        blobs = []
        for sample in samples:
            data = [sample[n] if isinstance(sample[n], bytes) else mds_payload(columns[n], sample[n]) for n in names]
            head = b"".join(struct.pack("<I", len(d)) for n, d in zip(names, data, strict=True) if fixed[n] is None)
            blobs.append(head + b"".join(data))
        text = json.dumps(config, sort_keys=True).encode()
        offsets = np.cumsum([4 * (len(blobs) + 2) + len(text), *map(len, blobs)])
        content = struct.pack("<I", len(blobs)) + offsets.astype("<u4").tobytes() + text + b"".join(blobs)
        name = f"shard.{number:05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        entries.append({**config, "samples": len(blobs), "raw_data": raw, "zip_data": None, **options})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def write_litdata(folder: Path, chunks: Sequence[Sequence[np.ndarray]], dtype: str = "uint16", **config: Any) -> Path:
    """A folder of litData chunks of a TokensLoader. chunks: the items of each."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, items in enumerate(chunks):
        parts = [little(item, dtype).tobytes() for item in items]
        offsets = np.cumsum([4 * (len(parts) + 2), *map(len, parts)]).astype("<u4")
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(struct.pack("<I", len(parts)) + offsets.tobytes() + b"".join(parts))
        tokens = sum(map(len, items))
        entries.append({"chunk_bytes": sum(map(len, parts)), "chunk_size": len(parts), "dim": tokens, "filename": name})
    settings = {
        "compression": None, "data_format": [f"no_header_tensor:{LITDATA_CODES[dtype]}"], "encryption": None,
        "item_loader": "TokensLoader", **config,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"chunks": entries, "config": settings}))
    return folder
