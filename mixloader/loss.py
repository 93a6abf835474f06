"""Cross-entropy that also adds every token's loss to its domain's sums, in the same pass over the logits.

float32, bfloat16 and float16 logits on a CUDA device go through the Triton kernel; everything else (CPU, float64, CUDA
without Triton) through plain torch, with the same meaning and the same integer sums.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mixloader import loss_torch
from mixloader.stats import DomainStats

_LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX_DTYPES = (torch.int64, torch.int32)
_REDUCTIONS = ("mean", "sum", "none")


def domain_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    domain_ids: torch.Tensor | None,
    *,
    stats: DomainStats | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy in nats between logits and targets; adds token losses to `stats` by domain.

    logits: [N, V] or [B, T, V], float32, bfloat16, float16 or float64, of any strides. Not changed.
    targets: [N] or [B, T], int64 or int32, the class of each row; `ignore_index` for none.
    domain_ids: int64 or int32, of the shape of targets, or [B] with one id for all tokens of a row of [B, T]. An id of
        -1 counts nowhere. Needed only with `stats`, else it may be None; the loss never depends on it.
    stats: where to add. Nothing is added outside grad mode, while `stats.paused()`, or by a recomputation of
        activation checkpointing (see DomainStats).
    reduction: "mean" over the valid targets, "sum", or "none" (the shape of targets).

    Returns float32 (float64 for float64 logits) whatever the dtype of the logits. Gradients have the dtype of the
    logits. With "mean" and "sum" they are computed in the forward pass and scaled in the backward pass if the upstream
    gradient is not 1, except for float16, where that would underflow before a gradient scaler can help; with "none"
    they are computed in the backward pass, in float32 and rounded once. Differentiable once.

    A target that is neither a class nor ignore_index has loss 0 and gradient 0, like an ignored one, is left out of
    the mean and is counted as a bad token in `stats`, as is a NaN or infinite loss (which does reach the returned
    loss) and a domain id below -1 or at or above n_domains (which changes nothing else). `StatsSnapshot.wait` raises
    for them; without `stats`, bad targets go unnoticed. The mean of no valid target is NaN, as in torch, with
    gradient 0. Nothing waits for the device.

    Raises TypeError for a wrong dtype and ValueError for wrong shapes, devices or reduction, before any work.
    """
    _check_logits(logits, targets, ignore_index, reduction)
    _check_domains(logits, targets, domain_ids, stats)
    rows = logits.reshape(-1, logits.shape[-1])
    classes = targets.reshape(-1).contiguous()
    ids = None if domain_ids is None else domain_ids.reshape(-1).contiguous()
    counting = stats if stats is not None and stats.counting() else None
    path = _path(rows)
    differentiable = torch.is_grad_enabled() and rows.requires_grad
    if reduction != "none" and differentiable and rows.dtype != torch.float16:
        return _ReducedLoss.apply(rows, classes, ids, counting, ignore_index, path, reduction == "mean")
    losses = _TokenLosses.apply(rows, classes, ids, counting, ignore_index, path)
    if reduction == "none":
        return losses.view(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / path.valid_count(classes, rows.shape[1], ignore_index, losses.dtype)[0]


class _ReducedLoss(torch.autograd.Function):
    """Mean or sum, with the gradient computed in the forward pass, so that the logits need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        targets: torch.Tensor,
        domain_ids: torch.Tensor | None,
        stats: DomainStats | None,
        ignore_index: int,
        path: ModuleType,
        mean: bool,
    ) -> torch.Tensor:
        dtype = loss_torch.loss_dtype(rows)
        if mean:
            count, scale = path.valid_count(targets, rows.shape[1], ignore_index, dtype).split(1)
        else:
            scale = torch.ones(1, dtype=dtype, device=rows.device)
        losses, _, gradient = path.forward(rows, targets, ignore_index, stats, domain_ids, scale)
        ctx.save_for_backward(gradient)
        ctx.path = path
        return losses.sum() / count[0] if mean else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The saved gradient may be scaled in place only if no further backward pass will read it.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradient = gradient.clone()
        return ctx.path.rescale(gradient, upstream), None, None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """A loss for each token, with the gradient computed in the backward pass, exact for any upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        targets: torch.Tensor,
        domain_ids: torch.Tensor | None,
        stats: DomainStats | None,
        ignore_index: int,
        path: ModuleType,
    ) -> torch.Tensor:
        losses, saved, _ = path.forward(rows, targets, ignore_index, stats, domain_ids, None)
        ctx.save_for_backward(rows, targets, *saved)
        ctx.ignore_index = ignore_index
        ctx.path = path
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, targets, *saved = ctx.saved_tensors
        gradient = ctx.path.backward(rows, targets, ctx.ignore_index, saved, upstream.contiguous())
        return gradient, None, None, None, None, None


def _path(rows: torch.Tensor) -> ModuleType:
    """The module that computes these rows."""
    if rows.is_cuda and rows.dtype != torch.float64 and _has_triton():
        from mixloader.kernels import cross_entropy

        return cross_entropy
    return loss_torch


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_logits(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(_REDUCTIONS)}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}; expected an integer")
    _check_dtype("logits", logits, _LOGITS_DTYPES)
    _check_dtype("targets", targets, _INDEX_DTYPES)
    _check_device("targets", targets.device, logits.device)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {list(logits.shape)}; expected [N, V] or [B, T, V], at least one class")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {list(targets.shape)}; expected {list(logits.shape[:-1])}, "
            f"that of the logits {list(logits.shape)} without the classes"
        )


def _check_domains(
    logits: torch.Tensor, targets: torch.Tensor, domain_ids: torch.Tensor | None, stats: DomainStats | None
) -> None:
    if stats is not None:
        if not isinstance(stats, DomainStats):
            raise TypeError(f"stats is a {type(stats).__name__}; expected a DomainStats")
        if domain_ids is None:
            raise ValueError("stats are given but domain_ids is None; pass the domain of each row or token")
        _check_device("stats", stats.device, logits.device)
    if domain_ids is not None:
        _check_dtype("domain_ids", domain_ids, _INDEX_DTYPES)
        _check_device("domain_ids", domain_ids.device, logits.device)
        if domain_ids.shape not in (targets.shape, targets.shape[:1]):
            raise ValueError(
                f"domain_ids have shape {list(domain_ids.shape)}; expected {list(targets.shape)}, that of the "
                f"targets, or {list(targets.shape[:1])}, one for each row of the batch"
            )


def _check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} are {str(tensor.dtype).removeprefix('torch.')}; expected {names}")


def _check_device(name: str, found: torch.device, expected: torch.device) -> None:
    if found != expected:
        raise ValueError(f"{name} are on {found} but the logits are on {expected}; move them to one device")
