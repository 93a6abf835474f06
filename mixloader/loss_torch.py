"""Rows of a cross-entropy in plain torch: the path of CPU tensors, of float64, and of CUDA without Triton.

Rows are taken a few at a time, so that everything between the logits and the gradient stays in cache and in two
reused buffers. Arithmetic is float32 (float64 for float64 logits), whatever the dtype of the logits. The functions
have the same names and arguments as those of `mixloader.kernels.cross_entropy`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mixloader.stats import DomainStats

_CHUNK = 1 << 19
"""Elements in a chunk of rows: 2 MB of float32. Smaller chunks spend more on calls than they gain from the cache."""


def valid_count(targets: torch.Tensor, n_classes: int, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    """Number n of valid targets, and 1 / max(n, 1): [2], for the mean. `dtype` is that of the losses."""
    count = _valid(targets, n_classes, ignore_index).sum().to(dtype)
    return torch.stack([count, count.clamp(min=1).reciprocal()])


def forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    stats: DomainStats | None,
    domain_ids: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Token losses, and what `backward` needs besides its other arguments, and a gradient if there is a `scale`.

    logits [N, V]; targets [N]; domain_ids [B], each for N / B consecutive rows, read if there are `stats`.
    scale [1]: the gradient is that of scale * sum(losses), in the dtype of the logits. Rows that are not valid have
    loss 0 and gradient 0.
    """
    n, n_classes = logits.shape
    valid = _valid(targets, n_classes, ignore_index)
    dtype = loss_dtype(logits)
    losses = torch.empty(n, dtype=dtype, device=logits.device)
    gradient = None if scale is None else _empty_like(logits)
    classes = targets.where(valid, 0).long()[:, None]
    for rows, log_p in _log_softmax(logits, dtype, gradient):
        losses[rows] = -log_p.gather(1, classes[rows])[:, 0]
        if scale is not None and gradient is not None:
            _gradient(log_p, classes[rows], scale.expand(n)[rows], gradient[rows])
    invalid = ~valid
    losses.masked_fill_(invalid, 0.0)
    if gradient is not None:
        _clear_rows(gradient, invalid)
    if stats is not None and domain_ids is not None:
        ids = domain_ids[:, None].expand(-1, n // max(len(domain_ids), 1)).reshape(-1)
        stats.add(losses, ids, valid, targets == ignore_index)
    return losses, (), gradient


def backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    saved: tuple[torch.Tensor, ...],
    scale: torch.Tensor,
) -> torch.Tensor:
    """Gradient [N, V], in the dtype of the logits, of sum(scale * losses); scale [1] or [N]."""
    n, n_classes = logits.shape
    valid = _valid(targets, n_classes, ignore_index)
    gradient = _empty_like(logits)
    classes = targets.where(valid, 0).long()[:, None]
    scale = scale.expand(n)
    for rows, log_p in _log_softmax(logits, loss_dtype(logits), gradient):
        _gradient(log_p, classes[rows], scale[rows], gradient[rows])
    _clear_rows(gradient, ~valid)
    return gradient


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient * factor, rounded once, in place; factor is a scalar tensor in the dtype of the losses."""
    if gradient.is_cpu:
        return gradient if factor == 1 else gradient.mul_(factor.item())
    for rows in gradient.split(_chunk_rows(gradient)):
        rows.copy_(rows.to(factor.dtype).mul_(factor))
    return gradient


def loss_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _valid(targets: torch.Tensor, n_classes: int, ignore_index: int) -> torch.Tensor:
    return (targets >= 0) & (targets < n_classes) & (targets != ignore_index)


def _chunk_rows(logits: torch.Tensor) -> int:
    return max(1, _CHUNK // logits.shape[1])


def _log_softmax(
    logits: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log-probabilities of some rows at a time, in the rows of `out` if that has this dtype, else in scratch."""
    n, n_classes = logits.shape
    step = min(_chunk_rows(logits), n)
    scratch = None if out is not None and out.dtype == dtype else logits.new_empty(step, n_classes, dtype=dtype)
    widened = None if logits.dtype == dtype else logits.new_empty(step, n_classes, dtype=dtype)
    for start in range(0, n, max(step, 1)):
        rows = slice(start, min(start + step, n))
        x = logits[rows]
        if widened is not None:
            x = widened[: len(x)].copy_(x)
        log_p = scratch[: len(x)] if scratch is not None else out[rows]  # type: ignore[index]
        yield rows, torch.log_softmax(x, 1, out=log_p)


def _gradient(log_p: torch.Tensor, classes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write scale * (p - onehot(class)) of some rows to `out`; overwrites log_p, which may be `out`."""
    p = log_p.exp_().mul_(scale[:, None])
    p.scatter_add_(1, classes, -scale[:, None])
    if p.data_ptr() != out.data_ptr():
        out.copy_(p)


def _clear_rows(gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """Zero the rows where `rows` [N] is true, NaN included."""
    if not gradient.is_cpu:
        gradient.masked_fill_(rows[:, None], 0.0)
    elif rows.any():
        gradient[rows] = 0.0


def _empty_like(logits: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of the shape of `logits`."""
    if not logits.is_cpu or logits.numel() == 0:
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    # Page faults of a fresh tensor cost as much as the arithmetic. numpy asks for huge pages, torch does not.
    n, n_classes = logits.shape
    pages = np.empty((n, n_classes * logits.element_size()), dtype=np.uint8)
    return torch.from_numpy(pages).view(logits.dtype)
