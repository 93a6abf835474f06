"""llm.c, fineweb and modded-nanogpt: 256 int32 of header, then tokens (karpathy/llm.c, data_common.py).

Magic 20240520 version 1 for uint16, magic 20240801 version 7 for uint32; the number of tokens is third.
"""

from __future__ import annotations

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import Choice, Format, Shard, announced_shard, is_nearly
from mixloader.formats.source import Source

LLMC_HEADER = 1024
LLMC_MAGIC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
_EVALUATION = 20240522  # examples of multiple choice, not running text


def _matches(source: Source) -> bool:
    return source.name.endswith(".bin") and int.from_bytes(source.read(0, 4), "little") in LLMC_MAGIC


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    path, header = source.path, source.read(0, LLMC_HEADER)
    if len(header) < LLMC_HEADER:
        raise ShardError(
            f"shard {path} has {len(header)} bytes, but an llm.c header alone has {LLMC_HEADER}; it was truncated"
        )
    magic, version, tokens = (int(x) for x in np.frombuffer(header, dtype="<i4", count=3))
    if magic not in LLMC_MAGIC:
        raise ShardError(
            f"shard {path} begins with {magic}, not with an llm.c magic number "
            f"({' or '.join(map(str, LLMC_MAGIC))}); check its format"
        )
    known_version, dtype = LLMC_MAGIC[magic]
    if version != known_version:
        raise ShardError(f"shard {path} is an llm.c file of version {version}; expected {known_version}")
    return (announced_shard(source, "llmc", choice, dtype, LLMC_HEADER, tokens),)


def refuse_damaged_header(source: Source) -> None:
    """Refuse a .bin that would be taken for bare tokens but begins like a file of llm.c."""
    start = source.read(0, 4)
    magic = int.from_bytes(start, "little")
    if magic == _EVALUATION:
        raise ShardError(f"{source.path} holds llm.c's examples for evaluation, not running text; leave it out")
    if any(is_nearly(start, known.to_bytes(4, "little")) for known in LLMC_MAGIC):
        raise ShardError(
            f"shard {source.path} begins with {magic}, nearly llm.c's magic number; it is damaged: restore it, or give "
            "format='nanogpt' if these are tokens"
        )


LLMC = Format("llmc", _matches, _open)
