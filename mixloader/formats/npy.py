"""NumPy's .npy (versions 1 to 3), and what OLMo and dolma call .npy: raw tokens without a header.

The header is a Python dictionary in text; it is parsed as a literal, and nothing in it is run.
"""

from __future__ import annotations

import ast
import math

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Choice, Format, Shard, announced_shard, is_nearly
from mixloader.formats.nanogpt import raw_tokens
from mixloader.formats.source import Source

_MAGIC = b"\x93NUMPY"
_LONGEST = 10_000  # bytes of a header that describes an array of numbers, as NumPy itself limits it


def _matches(source: Source) -> bool:
    return source.name.endswith(".npy")


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    start = source.read(0, 12)
    if is_nearly(start[: len(_MAGIC)], _MAGIC):
        raise ShardError(f"shard {source.path} begins with {start[:6]!r}, nearly NumPy's {_MAGIC!r}; it is damaged")
    if not start.startswith(_MAGIC[: len(start)]):
        return (raw_tokens(source, "npy", choice.dtype or "uint16"),)
    path, version = source.path, start[6:8]
    if len(start) < 12:
        raise ShardError(f"shard {path} ends within its NumPy header; it was truncated")
    if version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ShardError(f"shard {path} is a NumPy file of version {version[0]}.{version[1]}; expected 1.0, 2.0 or 3.0")
    begin = 10 if version == b"\1\0" else 12
    length = int.from_bytes(start[8:begin], "little")
    if length > _LONGEST:
        raise ShardError(f"shard {path} announces a NumPy header of {length} bytes; expected at most {_LONGEST}")
    text = source.read(begin, length)
    if len(text) < length:
        raise ShardError(f"shard {path} ends within its NumPy header; it was truncated")
    dtype, tokens = _parse(path, text)
    return (announced_shard(source, "npy", choice, dtype, begin + length, tokens),)


def _parse(path: str, text: bytes) -> tuple[str, int]:
    """The dtype and the number of tokens that a NumPy header announces."""
    try:
        header = ast.literal_eval(text.decode("utf-8"))
        order, shape, kind = header["fortran_order"], header["shape"], header["descr"]
        sound = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape) and isinstance(kind, str)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ShardError(f"shard {path} has a NumPy header that cannot be read: {error}") from error
    if not sound:
        raise ShardError(f"shard {path} has a NumPy header with shape {shape!r} and descr {kind!r}; expected an array")
    if order and len(shape) > 1:
        raise ShardError(f"shard {path} is in Fortran order; expected a row of tokens, or rows in C order")
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise ShardError(f"shard {path} has the unknown NumPy dtype {kind!r}") from error
    if dtype.name not in WIDTHS or dtype.newbyteorder("<") != dtype:
        raise ShardError(f"shard {path} holds NumPy dtype {kind!r}; expected one of {', '.join(WIDTHS)}, little-endian")
    return dtype.name, math.prod(shape)


NPY = Format("npy", _matches, _open)
