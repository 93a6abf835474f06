"""Megatron-LM's IndexedDataset: raw tokens in .bin, and .idx beside it (megatron.core.datasets.indexed_dataset).

.idx: 9 bytes of magic, u64 version 1, u8 dtype code, u64 sequences N, u64 D = documents + 1, then
i32 lengths in tokens [N], i64 byte pointers into .bin [N], i64 indexes of the sequences that begin documents [D].
"""

from __future__ import annotations

import struct

import numpy as np

from mixloader.errors import ShardError
from mixloader.formats.base import WIDTHS, Choice, Documents, Format, Shard, shard_of
from mixloader.formats.source import Source, is_url
from mixloader.formats.tables import keep_table

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_BLOCK = 1 << 20  # sequences checked at a time


def _matches(source: Source) -> bool:
    if source.name.endswith(".idx"):
        return True
    return source.name.endswith(".bin") and source.find(_stem(source) + ".idx") is not None


def _open(source: Source, choice: Choice) -> tuple[Shard, ...]:
    index, tokens = (_partner(source, suffix) for suffix in (".idx", ".bin"))
    header = index.read(0, _HEADER.size)
    if len(header) < _HEADER.size:
        raise ShardError(f"{index.path} has {index.size} bytes, fewer than its header; it was truncated")
    magic, version, code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ShardError(
            f"{index.path} begins with {magic!r}, not with {_MAGIC!r}; it is no Megatron index: "
            "restore it, or give format= if it belongs to something else"
        )
    if version != 1:
        raise ShardError(f"{index.path} is a Megatron index of version {version}; expected 1")
    dtype = _DTYPES.get(code, f"unknown (code {code})")
    if dtype not in WIDTHS:
        raise ShardError(f"{index.path} says that its tokens are {dtype}; expected one of {', '.join(WIDTHS)}")
    if choice.dtype not in (None, dtype):
        raise ShardError(f"shard {tokens.path} holds {dtype} tokens by its index, but {choice.dtype} was asked for")
    least = _HEADER.size + 12 * sequences + 8 * documents
    if index.size not in (least, least + sequences):  # a mode of one byte a sequence, in multimodal data
        raise ShardError(
            f"{index.path} has {index.size} bytes, but {sequences} sequences and {documents} document indices "
            f"take {least}; it was truncated or is damaged"
        )
    table = _Table(index, sequences, documents, WIDTHS[dtype])
    count = table.check(tokens)
    return (
        shard_of(
            tokens, "megatron", dtype, 0, count, documents=table.documents(), document_count=max(0, documents - 1)
        ),
    )


class _Table:
    """The three arrays of an index, read in blocks: a large one does not fit in memory."""

    def __init__(self, index: Source, sequences: int, documents: int, width: int):
        self.index, self.sequences, self.width, self.entries = index, sequences, width, documents
        self.pointers = _HEADER.size + 4 * sequences
        self.document_indices = self.pointers + 8 * sequences

    def read(self, offset: int, dtype: str, first: int, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return np.frombuffer(self.index.read(offset + first * size, count * size), dtype=dtype).astype(np.int64)

    def check(self, tokens: Source) -> int:
        """The number of tokens, if sequences follow each other without gaps from the first byte to the last."""
        end = 0
        for first in range(0, self.sequences, _BLOCK):
            count = min(_BLOCK, self.sequences - first)
            lengths = self.read(_HEADER.size, "<i4", first, count)
            pointers = self.read(self.pointers, "<i8", first, count)
            ends = end + np.cumsum(lengths) * self.width
            if (lengths < 0).any() or pointers[0] != end or (pointers[1:] != ends[:-1]).any():
                raise ShardError(
                    f"{self.index.path} has sequences of negative length or that do not follow each other "
                    f"(between {first} and {first + count}); it is damaged or was not written by Megatron-LM"
                )
            end = int(ends[-1])
        if end != tokens.size or end == 0:
            raise ShardError(
                f"shard {tokens.path} has {tokens.size} bytes, but {self.index.path} accounts for {end}; "
                "it was truncated, or the index belongs to another file"
            )
        return end // self.width

    def documents(self) -> Documents | None:
        """Where documents begin: the pointers themselves if each sequence is a document, else a table of its own."""
        if self.entries == 0:
            return None
        last, identity = -1, self.entries == self.sequences + 1
        for first in range(0, self.entries, _BLOCK):
            block = self.read(self.document_indices, "<i8", first, min(_BLOCK, self.entries - first))
            if block[0] < max(0, last) or (np.diff(block) < 0).any() or block[-1] > self.sequences:
                raise ShardError(
                    f"{self.index.path} has document indices that decrease or lie beyond its {self.sequences} "
                    "sequences; it is damaged"
                )
            identity = identity and bool((block == np.arange(first, first + len(block))).all())
            last = int(block[-1])
        if identity and not is_url(self.index.path) and self.index.compression is None:
            return Documents(self.index.path, self.pointers, self.sequences, unit=self.width)
        pointers = np.append(self.read(self.pointers, "<i8", 0, self.sequences) // self.width, np.iinfo(np.int64).max)
        # The last index is that of the end, which begins no document.
        starts = self.read(self.document_indices, "<i8", 0, self.entries)[:-1]
        return keep_table(pointers[starts[starts < self.sequences]])


def _stem(source: Source) -> str:
    return source.name.rsplit(".", 1)[0]


def _partner(source: Source, suffix: str) -> Source:
    if source.name.endswith(suffix):
        return source
    partner = source.find(_stem(source) + suffix)
    if partner is None:
        raise ShardError(
            f"{source.path} has no {_stem(source)}{suffix} beside it; a Megatron data set is a .bin and an .idx"
        )
    return partner


MEGATRON = Format("megatron", _matches, _open)
