"""litData's chunks of a TokensLoader: u32 items N, u32 offsets [N + 1] in bytes from the file's beginning, tokens.

An item is a document, or what a tokenizing function yielded at a time. index.json beside the chunks says
their dtype (litdata/streaming/writer.py, litdata/constants.py).
"""

from __future__ import annotations

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Choice, Documents, Format, Shard, shard_of
from mixloader.formats.listing import Listing, lists
from mixloader.formats.source import Source, is_url
from mixloader.formats.tables import keep_table

_TENSOR = {11: "uint8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64", 20: "uint16"}
_NUMPY = {1: "int16", 2: "int32", 3: "int64", 4: "uint8", 5: "uint16", 6: "uint32", 7: "uint64"}
_DTYPES = {"no_header_tensor": _TENSOR, "no_header_numpy": _NUMPY}
_MAX_BYTES = 1 << 32  # offsets are u32


def _matches(source: Source) -> bool:
    return lists(source, "chunks")


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    index = Listing.read(source)
    config = index.inner("config")
    assert config is not None
    dtype = _dtype(config)
    if choice.dtype not in (None, dtype):
        raise ShardError(f"{source.path} says that its tokens are {dtype}, but {choice.dtype} was asked for")
    compression = _compression(config)
    return tuple(_chunk(source, entry, dtype, compression) for entry in index.each("chunks"))


def _dtype(config: Listing) -> str:
    loader = config.take("item_loader", str, optional=True)
    if loader != "TokensLoader":
        raise ShardError(
            f"{config.path} is of item_loader {loader}; expected TokensLoader: write it with litdata.optimize"
        )
    formats = config.take("data_format", list)
    serializer, _, code = str(formats[0] if formats else "").partition(":")
    dtype = {str(known): dtype for known, dtype in _DTYPES.get(serializer, {}).items()}.get(code)
    if len(formats) != 1 or dtype is None:
        raise ShardError(f"{config.path} has data_format {formats}; expected one array of integers without a header")
    return dtype


def _compression(config: Listing) -> str | None:
    if config.take("encryption", dict, optional=True):
        raise ShardError(f"{config.path} says that its chunks are encrypted; mixloader does not read those")
    compression = config.take("compression", str, optional=True)
    if compression is None:
        return None
    level = config.take("compression_level", str, optional=True)
    if compression.partition(":")[0] != "zstd" or level not in (None, "chunk"):
        raise ShardError(f"{config.path} has compression {compression} by {level}; expected zstd of whole chunks")
    return "zstd"


def _chunk(index: Source, entry: Listing, dtype: str, compression: str | None) -> Shard:
    width = WIDTHS[dtype]
    tokens, items = entry.take("dim", int), entry.take("chunk_size", int)
    offset = 4 * (items + 2)
    expected = offset + tokens * width
    source = Source(index.beside(entry.take("filename", str)), compression, expected)
    if tokens == 0 or items == 0 or source.size != expected or expected >= _MAX_BYTES:
        raise ShardError(
            f"shard {source.path} has {source.size} bytes, but {index.path} announces {items} items with {tokens} "
            f"{dtype} tokens, {expected} bytes; it was truncated, or belongs to another index"
        )
    table = source.read(0, offset)
    numbers = np.frombuffer(table[: len(table) // 4 * 4], dtype="<u4").astype(np.int64)
    if (
        len(numbers) != items + 2
        or (numbers[0], numbers[1], numbers[-1]) != (items, offset, expected)
        or (numbers[2:] < numbers[1:-1]).any()
        or ((numbers[1:] - offset) % width).any()
    ):
        raise ShardError(
            f"shard {source.path} does not begin with its {items} items and ascending offsets of them up to its "
            f"{expected} bytes; it is damaged, or belongs to another index"
        )
    # The first N offsets are where documents begin, in bytes; a file that is not at hand keeps no table at hand.
    ready = compression is None and not is_url(source.path)
    documents = (
        Documents(source.path, 4, items, width=4, bias=offset, unit=width)
        if ready
        else keep_table((numbers[1:-1] - offset) // width)
    )
    return shard_of(source, "litdata", dtype, offset, tokens, documents=documents, document_count=items)


LITDATA = Format("litdata", _matches, _open)
