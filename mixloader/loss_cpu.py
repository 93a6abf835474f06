"""Rows of a cross-entropy on a CPU: float32, bfloat16 and float16 logits through the C++ core (csrc/loss.cpp).

A row is read once from memory: for its loss, and, while a cache still holds it, for its gradient. See
`mixloader.loss_path.LossPath` for the functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixloader import _core
from mixloader.loss_path import LossInputs, LossOptions
from mixloader.loss_torch import new_gradient, rescale, valid_count

__all__ = ["SAVED", "backward", "forward", "rescale", "valid_count"]

SAVED = 2  # maximum and sum of exponentials

LEVEL = _core.loss_levels()[-1]
"""The set of instructions. A loss may differ in its last bits from one to the other."""


def forward(
    inputs: LossInputs,
    options: LossOptions,
    sums: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    n = len(inputs.targets)
    losses, saved = torch.empty(n), torch.empty(SAVED, n)
    gradient = None if scale is None else new_gradient(inputs.logits) if out is None else out
    _rows(inputs, options, losses, saved, gradient, scale, sums)
    return losses, saved, gradient


def backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    gradient = new_gradient(inputs.logits) if out is None else out
    _rows(inputs, options, None, saved, gradient, scale, None)
    return gradient


def _rows(
    inputs: LossInputs,
    options: LossOptions,
    losses: torch.Tensor | None,
    saved: torch.Tensor,
    gradient: torch.Tensor | None,
    scale: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    if inputs.logits.stride(1) != 1:
        inputs = inputs._replace(logits=inputs.logits.contiguous())
    if sums is None:
        inputs = inputs._replace(reference_losses=None, token_bytes=None)
    written = {"losses": losses, "saved": saved, "gradient": gradient, "sums": sums}
    arrays: dict[str, Any] = {
        name: _array(tensor) for name, tensor in (inputs._asdict() | written | {"scale": scale}).items()
    }
    _core.loss_rows(**arrays, **options._asdict(), level=LEVEL, threads=torch.get_num_threads())


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    """The same memory; bfloat16, which numpy has not, as int16."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
