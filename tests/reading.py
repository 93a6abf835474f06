"""Rows read straight from the core, without a loader, and what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixloader import _core
from mixloader._core import Boundaries, TokenType
from mixloader.reference import ReferenceStream, domain_key

DTYPES = {TokenType.INT64: np.int64, TokenType.INT32: np.int32, TokenType.UINT16: np.uint16}


def described(path: Path, dtype: Any, tokens: int, **fields: Any) -> dict[str, Any]:
    """A shard for the core."""
    dtype = np.dtype(dtype)
    known = {"name": str(path), "path": str(path), "offset": 0, "tokens": tokens}
    return known | {"width": dtype.itemsize, "is_signed": dtype.kind == "i"} | fields


def written(path: Path, tokens: np.ndarray, **fields: Any) -> dict[str, Any]:
    """A shard of one run, written to `path`."""
    tokens.astype(tokens.dtype.newbyteorder("<")).tofile(path)
    return described(path, tokens.dtype, len(tokens), **fields)


@dataclass
class Rows:
    """inputs [B, T] (shared: [B, T + 1]), targets, positions and documents [B, T]."""

    inputs: np.ndarray
    targets: np.ndarray | None
    positions: np.ndarray
    documents: np.ndarray


class Reader:
    """The windows of one domain in the order of its plan, `batch_size` a batch (by default all in one)."""

    def __init__(
        self, shards: Sequence[dict[str, Any]], seq_len: int, *, batch_size: int | None = None, **options: Any
    ):
        shards = [shard | {"windows": max(0, (shard["tokens"] - 1) // seq_len)} for shard in shards]
        self.seq_len = seq_len
        total = sum(shard["windows"] for shard in shards)
        self.batch_size = batch_size or total
        self.plan = ReferenceStream(0, ["a"], [total], self.batch_size, {0: [_core.WEIGHT_ONE]})
        self.options = {"inputs": TokenType.INT64, "targets": TokenType.INT64, "shared": False} | options
        self.core = _core.Streamer(
            domains=[(domain_key("a"), shards)],
            seq_len=seq_len,
            seed=0,
            batch_size=self.batch_size,
            micro_batches=1,
            world_size=1,
            rank=0,
            units=np.array([_core.WEIGHT_ONE]),
            **{"vocab_size": 0, "threads": 0} | self.options,
        )
        self.pending: Rows | None = None

    def order(self) -> list[int]:
        """The windows of the next batch, to be asked once a batch."""
        return [row.window for row in self.plan.next_step()]

    def next(self) -> Rows:
        """The next batch; after an error, the same again."""
        if self.pending is None:
            shape = self.batch_size, self.seq_len
            wide = self.batch_size, self.seq_len + self.options["shared"]
            inputs = np.zeros(wide, DTYPES[self.options["inputs"]])
            targets = None if self.options["shared"] else np.zeros(shape, DTYPES[self.options["targets"]])
            rows = Rows(inputs, targets, np.full(shape, -1), np.full(shape, -1, np.int32))
            asked = self.options.get("boundaries", Boundaries.NONE) != Boundaries.NONE
            documents = (rows.positions, rows.documents) if asked else ()
            self.core.submit(inputs, targets, np.zeros(self.batch_size, np.int64), *documents)
            self.pending = rows
        self.core.next()
        rows, self.pending = self.pending, None
        return rows


def read(shards: Sequence[dict[str, Any]], seq_len: int, **options: Any) -> Rows:
    """All windows of the shards, in the order of the files."""
    reader = Reader(shards, seq_len, **options)
    rows = reader.next()
    back = np.argsort(reader.order())
    targets = None if rows.targets is None else rows.targets[back]
    return Rows(rows.inputs[back], targets, rows.positions[back], rows.documents[back])


def windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """[rows, seq_len + 1]: the windows of one shard."""
    return np.stack([tokens[i : i + seq_len + 1] for i in range(0, len(tokens) - seq_len, seq_len)])


__all__ = ["DTYPES", "Boundaries", "Reader", "Rows", "TokenType", "described", "read", "windows", "written"]
