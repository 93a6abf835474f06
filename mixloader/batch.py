"""The tensors of a micro-batch: which there are, their types, and the memory that the core fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mixloader import _core

IGNORED = -100
"""The target of a token that no loss is taken of, as torch has it."""

_TYPES = {
    torch.int64: _core.TokenType.INT64,
    torch.int32: _core.TokenType.INT32,
    torch.uint16: _core.TokenType.UINT16,
}


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


Tensors: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]"
"""inputs, targets [B, T], domain ids [B], positions, documents [B, T]; None for what the format has not."""


def as_tensors(handed: Tensors | tuple[Any, ...]) -> Tensors:
    """What the core handed over, as tensors: capsules of its own memory, or what was submitted, as it is."""
    if isinstance(handed[0], torch.Tensor):
        return cast(Tensors, handed)
    return cast(Tensors, tuple(None if capsule is None else from_dlpack(capsule) for capsule in handed))


def as_batch(tensors: Tensors) -> dict[str, Any]:
    """The tensors by name."""
    inputs, targets, domain_ids, positions, documents = tensors
    batch: dict[str, Any] = {"input_ids": inputs, "targets": targets, "domain_ids": domain_ids}
    if positions is not None:
        batch |= {"position_ids": positions, "document_ids": documents}
        batch |= segments(positions)
    return batch


def submit_pinned(core: _core.Streamer, format: BatchFormat) -> None:
    """Give the core page-locked memory for one more batch."""
    b, t = format.batch_size, format.seq_len

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=format.pin_memory)

    inputs = empty(b, t if format.contiguous else t + 1, dtype=format.dtype)
    targets = empty(b, t, dtype=format.target_dtype) if format.contiguous else None
    others = (
        empty(b, dtype=torch.int64),
        empty(b, t, dtype=torch.int64) if format.documents else None,
        empty(b, t, dtype=torch.int32) if format.documents else None,
    )
    views = (inputs[:, :-1], inputs[:, 1:]) if targets is None else (inputs, targets)
    arrays = [cast(Any, None if tensor is None else tensor.numpy()) for tensor in (inputs, targets, *others)]
    core.submit(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], (*views, *others))


def segments(position_ids: torch.Tensor) -> dict[str, Any]:
    """Where documents begin and end, for variable-length attention over the flattened batch.

    position_ids: [B, T], 0 where a document, or the part of one that a row begins with, begins.
    Returns cu_seqlens, int32 [documents + 1], from 0 to B * T, and max_seqlen, an int.
    """
    flat = position_ids.view(-1)
    cu_seqlens = np.append(np.flatnonzero(flat.numpy() == 0), len(flat)).astype(np.int32)
    return {"cu_seqlens": torch.from_numpy(cu_seqlens), "max_seqlen": int(np.diff(cu_seqlens).max())}
