"""A shard: where its tokens lie in which file. Described here, read by the C++ core.

`read_tokens` is for tools and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.source import Source, is_url

WIDTHS = {"uint8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8}
"""Bytes a token, by dtype; all little-endian."""


@dataclass(frozen=True, eq=False)
class Extents:
    """Where tokens lie that are not one run: extents of tokens with something else in between.

    Of equal size: extent i holds `tokens` tokens from byte shard.offset + i * stride. Else `ends` and
    `bytes`, uint64 [E]: tokens up to and including each extent, and the byte where it begins.
    """

    tokens: int = 0
    stride: int = 0
    ends: np.ndarray | None = None
    bytes: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Extents)
            and (self.tokens, self.stride) == (other.tokens, other.stride)
            and (self.ends is None) == (other.ends is None)
            and bool(np.array_equal(self.ends, other.ends))  # type: ignore[arg-type]
            and bool(np.array_equal(self.bytes, other.bytes))  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Documents:
    """A table of the tokens at which documents begin (0 is always one, whether it is listed or not).

    path: the file with the table (the shard's own path: in the raw content of the shard itself): `count`
    ascending little-endian numbers of `width` bytes (4 or 8) from byte `offset`; number x stands for token
    (x - bias) / unit, and one past the last token for none. digest: "sha256:HEX" of a file of its own, or None.
    """

    path: str
    offset: int
    count: int
    width: int = 8
    bias: int = 0
    unit: int = 1
    digest: str | None = None


@dataclass(frozen=True)
class Shard:
    """A file of tokens, or the part of one that belongs together.

    path: absolute, or a URL. dtype: a key of WIDTHS, little-endian. offset: bytes before the first token,
    of the raw content. tokens: how many. bytes: size of the raw content.
    compression: None, "zstd" or "gzip". stored_bytes: size of a compressed file as it is stored.
    digest: "ALGORITHM:HEX" of the file as it is stored, or None.
    document_count: documents, where that is known; documents: where they begin, where a table says it;
    extents_are_documents: each extent is one. checksums: path of a sidecar of block checksums.
    """

    path: str
    format: str
    dtype: str
    offset: int
    tokens: int
    bytes: int
    digest: str | None = None
    extents: Extents | None = None
    documents: Documents | None = None
    checksums: str | None = None
    compression: str | None = None
    stored_bytes: int | None = None
    document_count: int | None = None
    extents_are_documents: bool = False

    @property
    def width(self) -> int:
        """Bytes a token."""
        return WIDTHS[self.dtype]

    @property
    def is_ready(self) -> bool:
        """Whether the file can be read where it lies; else it is fetched or decompressed first."""
        return self.compression is None and not is_url(self.path)

    def for_core(self) -> dict[str, Any]:
        """What the C++ core needs to know of it."""
        known: dict[str, Any] = {
            "name": self.path,
            "path": self.path if self.is_ready else "",
            "offset": self.offset,
            "tokens": self.tokens,
            "width": self.width,
            "is_signed": self.dtype.startswith("int"),
        }
        if self.extents is not None and self.extents.ends is not None:
            known |= {"extent_ends": self.extents.ends, "extent_bytes": self.extents.bytes}
        elif self.extents is not None:
            known |= {"extent_tokens": self.extents.tokens, "extent_stride": self.extents.stride}
        if self.documents is not None:
            known["documents"] = {key: value for key, value in vars(self.documents).items() if key != "digest"}
        if self.extents_are_documents:
            known["extents_are_documents"] = True
        if self.checksums is not None:
            known["checksums"] = self.checksums
        return known


@dataclass(frozen=True)
class Choice:
    """What a user says of files that do not say it of themselves.

    dtype: of the tokens. column: the one with them. documents: "samples" if samples of one size are documents too.
    """

    dtype: str | None = None
    column: str | None = None
    documents: str | None = None


def is_nearly(found: bytes, magic: bytes) -> bool:
    """Whether what stands where a magic is expected is that, but for one damaged bit or two."""
    differing = int.from_bytes(found, "little") ^ int.from_bytes(magic, "little")
    return len(found) == len(magic) and 0 < differing.bit_count() <= 2


@dataclass(frozen=True)
class Format:
    """A format of other programs.

    matches: whether a file is of this format, by its name and content. open: its shards, after checking
    all that it says of itself; a file that lists others gives theirs. Raises ShardError.
    """

    name: str
    matches: Callable[[Source], bool]
    open: Callable[[Source, Choice], tuple[Shard, ...]]


def shard_of(source: Source, format: str, dtype: str, offset: int, tokens: int, **rest: Any) -> Shard:
    """The Shard of a source's file."""
    return Shard(
        path=source.path,
        format=format,
        dtype=dtype,
        offset=offset,
        tokens=tokens,
        bytes=source.size,
        compression=source.compression,
        stored_bytes=None if source.compression is None else source.stored_bytes,
        **rest,
    )


def announced_shard(source: Source, format: str, choice: Choice, dtype: str, offset: int, tokens: int) -> Shard:
    """The Shard of a file whose header says its dtype and number of tokens, which fill it from byte `offset` on.

    Raises ShardError if the file has another size, or the user asked for another dtype.
    """
    path = source.path
    if choice.dtype not in (None, dtype):
        raise ShardError(f"shard {path} holds {dtype} tokens by its header, but {choice.dtype} was asked for")
    expected = offset + tokens * WIDTHS[dtype]
    if tokens <= 0 or source.size != expected:
        raise ShardError(
            f"shard {path} has {source.size} bytes, but its header announces {tokens} {dtype} tokens, "
            f"{expected} bytes; {'it is empty' if tokens == 0 else 'it was truncated or appended to'}: write it again"
        )
    return shard_of(source, format, dtype, offset, tokens)


def read_tokens(shard: Shard, start: int = 0, count: int | None = None) -> np.ndarray:
    """Tokens [start, start + count) of a shard (to its end by default) as a new array of its dtype."""
    count = shard.tokens - start if count is None else count
    if start < 0 or count < 0 or start + count > shard.tokens:
        raise ValueError(f"tokens [{start}, {start + count}) are not within the {shard.tokens} of shard {shard.path}")
    return _read(Source(shard.path, shard.compression), shard, start, count)


def token_blocks(shard: Shard, count: int = 1 << 22) -> Iterator[np.ndarray]:
    """All tokens of a shard in blocks of `count` and a rest; a compressed one is decompressed once."""
    source = Source(shard.path, shard.compression)
    for start in range(0, shard.tokens, count):
        yield _read(source, shard, start, min(count, shard.tokens - start))


def _read(source: Source, shard: Shard, start: int, count: int) -> np.ndarray:
    dtype = np.dtype(shard.dtype).newbyteorder("<")
    parts = [source.read(offset, tokens * shard.width) for offset, tokens in _runs(shard, start, count)]
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    if len(content) != count * shard.width:
        raise ShardError(
            f"shard {shard.path} gave {len(content) // shard.width} tokens from token {start} on; expected {count}: "
            "it was truncated, restore it"
        )
    return np.frombuffer(bytearray(content), dtype=dtype)


def _runs(shard: Shard, start: int, count: int) -> list[tuple[int, int]]:
    """(byte, tokens) of each run of tokens that [start, start + count) consists of."""
    extents, width = shard.extents, shard.width
    if extents is None:
        return [(shard.offset + start * width, count)]
    runs = []
    stop = start + count
    if extents.ends is None:
        for i in range(start // extents.tokens, -(-stop // extents.tokens)):
            first = max(start, i * extents.tokens)
            last = min(stop, (i + 1) * extents.tokens)
            runs.append((shard.offset + i * extents.stride + (first - i * extents.tokens) * width, last - first))
        return runs
    assert extents.bytes is not None
    i = int(np.searchsorted(extents.ends, start, side="right"))
    while start < stop:
        begin = int(extents.ends[i - 1]) if i else 0
        last = min(stop, int(extents.ends[i]))
        runs.append((int(extents.bytes[i]) + (start - begin) * width, last - start))
        start, i = last, i + 1
    return runs
