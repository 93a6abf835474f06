"""llm.c, fineweb and modded-nanogpt: 256 int32 of header, then tokens (karpathy/llm.c, data_common.py).

Magic 20240520 version 1 for uint16, magic 20240801 version 7 for uint32; the number of tokens is third.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Shard

LLMC_HEADER = 1024
LLMC_MAGIC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


def open_llmc(path: Path, size: int, header: bytes, dtype: str | None) -> Shard:
    if len(header) < LLMC_HEADER:
        raise ShardError(
            f"shard {path} has {size} bytes, but an llm.c header alone has {LLMC_HEADER}; it was truncated"
        )
    magic, version, tokens = (int(x) for x in np.frombuffer(header, dtype="<i4", count=3))
    if magic not in LLMC_MAGIC:
        raise ShardError(
            f"shard {path} begins with {magic}, not with an llm.c magic number "
            f"({' or '.join(map(str, LLMC_MAGIC))}); check its format"
        )
    known_version, own_dtype = LLMC_MAGIC[magic]
    if version != known_version:
        raise ShardError(f"shard {path} is an llm.c file of version {version}; expected {known_version}")
    if dtype not in (None, own_dtype):
        raise ShardError(f"shard {path} holds {own_dtype} tokens by its header, but {dtype} was asked for")
    expected = LLMC_HEADER + tokens * WIDTHS[own_dtype]
    if tokens <= 0 or size != expected:
        raise ShardError(
            f"shard {path} has {size} bytes, but its header announces {tokens} {own_dtype} tokens, "
            f"{expected} bytes; {'it is empty' if tokens == 0 else 'it was truncated or appended to'}: write it again"
        )
    return Shard(str(path.absolute()), "llmc", own_dtype, LLMC_HEADER, tokens, size)
