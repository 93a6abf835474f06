"""nanoGPT's .bin: raw little-endian tokens, no header (karpathy/nanoGPT, prepare.py)."""

from __future__ import annotations

from pathlib import Path

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Shard


def open_nanogpt(path: Path, size: int, header: bytes, dtype: str | None) -> Shard:
    dtype = dtype or "uint16"
    tokens, rest = divmod(size, WIDTHS[dtype])
    if rest:
        raise ShardError(
            f"shard {path} has {size} bytes, which is no whole number of {dtype} tokens; "
            "it was truncated, or its dtype is another"
        )
    return Shard(str(path.absolute()), "nanogpt", dtype, 0, tokens, size)
