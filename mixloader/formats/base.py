"""A shard: where its tokens lie in which file. Described here, read by the C++ core.

`read_tokens` is for tools and evaluation.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixloader.errors import ManifestError, ShardError

WIDTHS = {"uint8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8}
"""Bytes a token, by dtype; all little-endian."""


@dataclass(frozen=True)
class Extents:
    """Where tokens lie that are not one run: extents of tokens with something else in between.

    Of equal size: extent i holds `tokens` tokens from byte shard.offset + i * stride. Else `ends` and
    `bytes`, uint64 [E]: tokens up to and including each extent, and the byte where it begins.
    """

    tokens: int = 0
    stride: int = 0
    ends: np.ndarray | None = None
    bytes: np.ndarray | None = None


@dataclass(frozen=True)
class Documents:
    """A table of the tokens at which documents begin (0 is always one, whether it is listed or not).

    path: the file with the table: `count` ascending little-endian numbers of `width` bytes (4 or 8) from
    byte `offset`; number x stands for token (x - bias) / unit, and one past the last token for none.
    """

    path: str
    offset: int
    count: int
    width: int = 8
    bias: int = 0
    unit: int = 1


@dataclass(frozen=True)
class Shard:
    """A file of tokens.

    path: absolute. dtype: a key of WIDTHS, little-endian. offset: bytes before the first token.
    tokens: how many. bytes: size of the file. sha256: hex digest of the file, or None.
    """

    path: str
    format: str
    dtype: str
    offset: int
    tokens: int
    bytes: int
    sha256: str | None = None
    extents: Extents | None = None
    documents: Documents | None = None
    checksums: str | None = None

    @property
    def width(self) -> int:
        """Bytes a token."""
        return WIDTHS[self.dtype]

    def for_core(self) -> dict[str, Any]:
        """What the C++ core needs to know of it."""
        known: dict[str, Any] = {
            "name": self.path,
            "path": self.path,
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
            known["documents"] = vars(self.documents)
        if self.checksums is not None:
            known["checksums"] = self.checksums
        return known


def open_shard(path: str | Path, *, format: str | None = None, dtype: str | None = None) -> Shard:
    """Describe the shard at `path` after checking its header against its size.

    format: "nanogpt" or "llmc"; by default llmc where its magic number stands, else nanogpt.
    dtype: "uint16" or "uint32" for headerless files, where nothing on disk says it; default uint16.
    Raises ShardError for a file that is missing, empty, truncated or not of this format.
    """
    path = Path(path)
    if format is not None and format not in _openers():
        raise ManifestError(f"unknown shard format {format!r}; known formats are {', '.join(_openers())}")
    if dtype is not None and dtype not in WIDTHS:
        raise ManifestError(f"unknown token dtype {dtype!r}; known dtypes are {', '.join(WIDTHS)}")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ShardError(f"shard {path} is not a regular file")
        with path.open("rb") as file:
            header = file.read(_HEAD)
    except ShardError:
        raise
    except FileNotFoundError as error:
        raise ShardError(f"shard {path} does not exist; check the path or restore the file") from error
    except (OSError, ValueError) as error:
        raise ShardError(f"cannot open shard {path}: {error}") from error
    if status.st_size == 0:
        raise ShardError(f"shard {path} is empty; write it again or take it out of its domain")
    if format is None:
        magic = int.from_bytes(header[:4], "little") if len(header) >= 4 else 0
        format = "llmc" if magic in (20240520, 20240801) else "nanogpt"
    return _openers()[format](path, status.st_size, header, dtype)


_HEAD = 1024  # bytes that an opener is given


def _openers() -> dict[str, Callable[[Path, int, bytes, str | None], Shard]]:
    from mixloader.formats.llmc import open_llmc
    from mixloader.formats.nanogpt import open_nanogpt

    return {"nanogpt": open_nanogpt, "llmc": open_llmc}


def read_tokens(shard: Shard, start: int = 0, count: int | None = None) -> np.ndarray:
    """Tokens [start, start + count) of a shard (to its end by default) as a new array of its dtype."""
    count = shard.tokens - start if count is None else count
    offset = shard.offset + start * shard.width
    try:
        tokens = np.fromfile(shard.path, dtype=np.dtype(shard.dtype).newbyteorder("<"), count=count, offset=offset)
    except OSError as error:
        raise ShardError(f"cannot read shard {shard.path}: {error}") from error
    if len(tokens) != count:
        raise ShardError(
            f"shard {shard.path} gave {len(tokens)} tokens from token {start} on; expected {count}: "
            "it was truncated, restore it"
        )
    return tokens
