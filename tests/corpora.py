"""Small data sets whose tokens say where they stand, so that any misread shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixloader.formats import LLMC_HEADER

WIDE = np.dtype("<u4")
NARROW = np.dtype("<u2")


def tagged(domain: int, tokens: int) -> np.ndarray:
    """uint32 [tokens]: the domain in the upper bits, the position in the lower twenty."""
    assert tokens < 1 << 20
    return (domain << 20 | np.arange(tokens)).astype(WIDE)


def write_raw(path: Path, tokens: np.ndarray) -> Path:
    """A nanoGPT shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens.tofile(path)
    return path


def write_llmc(path: Path, tokens: np.ndarray, *, magic: int = 20240801, version: int = 7) -> Path:
    """An llm.c shard, written without mixloader's own writer."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    assert path.stat().st_size == LLMC_HEADER + tokens.nbytes
    return path


def tagged_domains(folder: Path, sizes: dict[str, list[int]]) -> dict[str, list[Path]]:
    """{name: shards} of tagged llm.c shards; positions count on through a domain's shards."""
    data = {}
    for domain, (name, shard_sizes) in enumerate(sizes.items()):
        tokens = tagged(domain, sum(shard_sizes))
        ends = np.cumsum(shard_sizes)
        data[name] = [
            write_llmc(folder / name / f"train_{i:03d}.bin", tokens[end - size : end])
            for i, (size, end) in enumerate(zip(shard_sizes, ends, strict=True))
        ]
    return data
