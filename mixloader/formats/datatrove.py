"""datatrove's .ds: raw uint16 or uint32 tokens (huggingface/datatrove, TokenizedFile).

Beside it, both optional: .ds.index, the end of each document in tokens, uint64, without a count; and
.ds.metadata, text: "tokenizer|bytes a token", then the number of tokens.
"""

from __future__ import annotations

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Choice, Documents, Format, Shard, shard_of
from mixloader.formats.source import Source, is_url
from mixloader.formats.tables import keep_table

_DTYPES = {2: "uint16", 4: "uint32"}
_BLOCK = 1 << 20  # entries of the index checked at a time


def _matches(source: Source) -> bool:
    return source.name.endswith(".ds")


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    index, metadata = (source.find(source.name + suffix) for suffix in (".index", ".metadata"))
    width, announced = (None, None) if metadata is None else _metadata(metadata)
    documents, ends = (None, None) if index is None else _index(index)
    if ends is not None and announced is not None and ends != announced:
        raise ShardError(
            f"{source.path}.index ends at token {ends}, but {source.path}.metadata says {announced} tokens; "
            "they belong to different files"
        )
    announced = ends if announced is None else announced
    if width is None and announced and source.size in (2 * announced, 4 * announced):
        width = source.size // announced
    dtype = choice.dtype or ("uint16" if width is None else _DTYPES[width])
    if width is not None and WIDTHS[dtype] != width:
        raise ShardError(f"shard {source.path} holds {_DTYPES[width]} tokens, but {choice.dtype} was asked for")
    tokens, rest = divmod(source.size, WIDTHS[dtype])
    if rest or (announced is not None and tokens != announced):
        raise ShardError(
            f"shard {source.path} has {source.size} bytes, but {announced or 'a whole number of'} {dtype} tokens were "
            "expected; it was truncated, or its index belongs to another file"
        )
    count = None if documents is None else documents.count
    return (shard_of(source, "datatrove", dtype, 0, tokens, documents=documents, document_count=count),)


def _metadata(source: Source) -> tuple[int, int]:
    """Bytes a token, and tokens."""
    lines = source.read(0, 1 << 16).decode("utf-8", "replace").splitlines()
    try:
        width, tokens = int(lines[0].rsplit("|", 1)[1]), int(lines[1])
    except (IndexError, ValueError) as error:
        raise ShardError(f"{source.path} does not begin with 'tokenizer|bytes a token' and a count") from error
    if width not in _DTYPES:
        raise ShardError(f"{source.path} says {width} bytes a token; expected 2 or 4")
    return width, tokens


def _index(source: Source) -> tuple[Documents, int]:
    """The table of documents, and the token at which the last one ends."""
    count, rest = divmod(source.size, 8)
    if rest:
        raise ShardError(f"{source.path} has {source.size} bytes, no whole number of uint64; it was truncated")
    last = 0
    parts = []
    for first in range(0, count, _BLOCK):
        ends = np.frombuffer(source.read(first * 8, _BLOCK * 8), dtype="<u8")
        if int(ends[0]) < last or (ends[1:] < ends[:-1]).any():
            raise ShardError(f"{source.path} has document ends that decrease; it is damaged, write it again")
        last = int(ends[-1])
        if is_url(source.path):
            parts.append(ends)
    # Where a document ends, the next begins: the ends are a table of beginnings, after the first.
    return keep_table(np.concatenate(parts)) if parts else Documents(source.path, 0, count), last


DATATROVE = Format("datatrove", _matches, _open)
