"""The tensors of a micro-batch: which there are, their types, and the memory that the core fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from mixloader import _core

IGNORED = -100
"""The target of a token that no loss is taken of, as torch has it."""

_TYPES = {
    torch.int64: _core.TokenType.INT64,
    torch.int32: _core.TokenType.INT32,
    torch.uint16: _core.TokenType.UINT16,
}


Arrays: TypeAlias = "tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None, np.ndarray | None]"
"""inputs, targets, domain ids, positions, documents: as the core has them, None for what the format has not."""


@dataclass(frozen=True)
class BatchFormat:
    """What a batch is made of.

    dtype, target_dtype: of input_ids and targets: int64, int32 or uint16 (to be widened on the GPU).
    contiguous: False makes both views of one [B, T + 1] tensor, which is written in two thirds of the time.
    documents: with position_ids, document_ids, cu_seqlens and max_seqlen.
    masked: some targets may be IGNORED.
    """

    batch_size: int
    seq_len: int
    dtype: torch.dtype = torch.int64
    target_dtype: torch.dtype = torch.int64
    contiguous: bool = True
    documents: bool = False
    masked: bool = False
    pin_memory: bool = False

    def __post_init__(self) -> None:
        for name, dtype in (("dtype", self.dtype), ("target_dtype", self.target_dtype)):
            if dtype not in _TYPES:
                raise ValueError(f"{name} is {dtype!r}; expected torch.int64, torch.int32 or torch.uint16")
        if not self.contiguous and self.dtype != self.target_dtype:
            raise ValueError(
                f"with contiguous=False inputs and targets are views of one tensor, but dtype is {self.dtype} and "
                f"target_dtype is {self.target_dtype}; give both the same"
            )
        if self.masked and self.target_dtype == torch.uint16:
            raise ValueError(f"masked targets are {IGNORED}, which uint16 does not hold; use another target_dtype")
        if self.masked and not self.contiguous:
            raise ValueError("masked targets differ from the next inputs, so contiguous=False cannot hold both")

    def for_core(self) -> dict[str, Any]:
        """The core's arguments."""
        return {
            "inputs": _TYPES[self.dtype],
            "targets": _TYPES[self.target_dtype],
            "shared": not self.contiguous,
            "mask_targets": self.masked,
        }


class Buffers:
    """The tensors of one batch, [B, T] but for domain_ids [B]; filled by the core, then the user's for ever.

    arrays: memory of the core, which takes it back when the last tensor over it is gone. None: memory of torch's,
    page-locked if so asked.
    """

    def __init__(self, format: BatchFormat, arrays: Arrays | None):
        if arrays is None:
            tensors = _allocate(format)
            arrays = cast(Arrays, tuple(None if tensor is None else tensor.numpy() for tensor in tensors))
        else:
            tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
        self.arrays = arrays
        self._inputs, self._targets, self._domain_ids, self._positions, self._documents = tensors

    def batch(self) -> dict[str, Any]:
        """The filled tensors by name."""
        if self._targets is None:
            batch: dict[str, Any] = {"input_ids": self._inputs[:, :-1], "targets": self._inputs[:, 1:]}
        else:
            batch = {"input_ids": self._inputs, "targets": self._targets}
        batch["domain_ids"] = self._domain_ids
        if self._positions is not None:
            batch |= {"position_ids": self._positions, "document_ids": self._documents}
            batch |= segments(self._positions)
        return batch


def _allocate(format: BatchFormat) -> list[Any]:
    b, t = format.batch_size, format.seq_len

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=format.pin_memory)

    return [
        empty(b, t if format.contiguous else t + 1, dtype=format.dtype),
        empty(b, t, dtype=format.target_dtype) if format.contiguous else None,
        empty(b, dtype=torch.int64),
        empty(b, t, dtype=torch.int64) if format.documents else None,
        empty(b, t, dtype=torch.int32) if format.documents else None,
    ]


def segments(position_ids: torch.Tensor) -> dict[str, Any]:
    """Where documents begin and end, for variable-length attention over the flattened batch.

    position_ids: [B, T], 0 where a document, or the part of one that a row begins with, begins.
    Returns cu_seqlens, int32 [documents + 1], from 0 to B * T, and max_seqlen, an int.
    """
    flat = position_ids.view(-1)
    cu_seqlens = np.append(np.flatnonzero(flat.numpy() == 0), len(flat)).astype(np.int32)
    return {"cu_seqlens": torch.from_numpy(cu_seqlens), "max_seqlen": int(np.diff(cu_seqlens).max())}
