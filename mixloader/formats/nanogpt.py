"""nanoGPT's .bin: raw little-endian tokens, no header (karpathy/nanoGPT, prepare.py)."""

from __future__ import annotations

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Choice, Format, Shard, shard_of
from mixloader.formats.source import Source


def raw_tokens(source: Source, format: str, dtype: str) -> Shard:
    """The shard of a file that is nothing but tokens."""
    tokens, rest = divmod(source.size, WIDTHS[dtype])
    if rest:
        raise ShardError(
            f"shard {source.path} has {source.size} bytes, which is no whole number of {dtype} tokens; "
            "it was truncated, or its dtype is another"
        )
    return shard_of(source, format, dtype, 0, tokens)


def _matches(source: Source) -> bool:
    return source.name.endswith(".bin")


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    return (raw_tokens(source, "nanogpt", choice.dtype or "uint16"),)


NANOGPT = Format("nanogpt", _matches, _open)
