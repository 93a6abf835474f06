"""Token shards as other programs write them, read in place.

nanogpt  raw little-endian tokens, no header (karpathy/nanoGPT, prepare.py).
llmc     256 int32 of header, then tokens: magic 20240520 version 1 for uint16, magic 20240801
         version 7 for uint32, the number of tokens third (karpathy/llm.c, data_common.py).

A shard is described here and read by the C++ core; `read_tokens` is for tools and evaluation.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixloader.errors import ManifestError, ShardError

WIDTHS = {"uint16": 2, "uint32": 4}
LLMC_HEADER = 1024
LLMC_MAGIC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}


@dataclass(frozen=True)
class Shard:
    """A file of tokens.

    path: absolute. dtype: "uint16" or "uint32", little-endian. offset: bytes before the first token.
    tokens: how many. bytes: size of the file. sha256: hex digest of the file, or None.
    """

    path: Path
    format: str
    dtype: str
    offset: int
    tokens: int
    bytes: int
    sha256: str | None = None

    @property
    def width(self) -> int:
        """Bytes a token."""
        return WIDTHS[self.dtype]


def open_shard(path: str | Path, *, format: str | None = None, dtype: str | None = None) -> Shard:
    """Describe the shard at `path` after checking its header against its size.

    format: "nanogpt" or "llmc"; by default llmc where its magic number stands, else nanogpt.
    dtype: "uint16" or "uint32" for headerless files, where nothing on disk says it; default uint16.
    Raises ShardError for a file that is missing, empty, truncated or not of this format.
    """
    path = Path(path)
    if format is not None and format not in _OPENERS:
        raise ManifestError(f"unknown shard format {format!r}; known formats are {', '.join(_OPENERS)}")
    if dtype is not None and dtype not in WIDTHS:
        raise ManifestError(f"unknown token dtype {dtype!r}; known dtypes are {', '.join(WIDTHS)}")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ShardError(f"shard {path} is not a regular file")
        with path.open("rb") as file:
            header = file.read(LLMC_HEADER)
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
        format = "llmc" if magic in LLMC_MAGIC else "nanogpt"
    return _OPENERS[format](path, status.st_size, header, dtype)


def _open_nanogpt(path: Path, size: int, header: bytes, dtype: str | None) -> Shard:
    dtype = dtype or "uint16"
    tokens, rest = divmod(size, WIDTHS[dtype])
    if rest:
        raise ShardError(
            f"shard {path} has {size} bytes, which is no whole number of {dtype} tokens; "
            "it was truncated, or its dtype is another"
        )
    return Shard(path.absolute(), "nanogpt", dtype, 0, tokens, size)


def _open_llmc(path: Path, size: int, header: bytes, dtype: str | None) -> Shard:
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
    return Shard(path.absolute(), "llmc", own_dtype, LLMC_HEADER, tokens, size)


_OPENERS: dict[str, Callable[[Path, int, bytes, str | None], Shard]] = {
    "nanogpt": _open_nanogpt,
    "llmc": _open_llmc,
}


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
