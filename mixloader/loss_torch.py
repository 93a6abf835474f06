"""Rows of a cross-entropy in plain torch: the path of float64, and of every device without one of its own.

Rows are taken a few at a time, so that everything between the logits and the gradient stays in cache and in two
reused buffers. See `mixloader.loss_path.LossPath` for the functions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mixloader.loss_path import LossInputs, LossOptions, empty_gradient, gradient_stride, is_valid, loss_dtype
from mixloader.stats import add_tokens

SAVED = 0

_CHUNK = 1 << 19
"""Elements in a chunk of rows: 2 MB of float32. Smaller chunks spend more on calls than they gain from the cache."""


def valid_count(targets: torch.Tensor, n_classes: int, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    count = is_valid(targets, n_classes, ignore_index).sum().to(dtype)
    return torch.stack([count, count.clamp(min=1).reciprocal()])


def forward(
    inputs: LossInputs,
    options: LossOptions,
    sums: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    logits, n = inputs.logits, len(inputs.targets)
    dtype = loss_dtype(logits)
    valid = inputs.valid(options.ignore_index)
    classes = inputs.targets.where(valid, 0).long()[:, None]
    weights = inputs.weights()
    gradient = None if scale is None else new_gradient(logits) if out is None else out
    nll, losses = logits.new_empty(n, dtype=dtype), logits.new_empty(n, dtype=dtype)
    distribution = logits.new_empty(3, n, dtype=dtype) if sums is not None and options.distribution else None
    for rows, x, log_p in _log_softmax(logits, options.softcap, gradient):
        y = classes[rows]
        nll[rows] = -log_p.gather(1, y)[:, 0]
        losses[rows] = _smoothed(nll[rows], log_p, options.label_smoothing)
        lse = torch.logsumexp(x, 1) if options.z_loss else None
        if lse is not None:
            losses[rows] += options.z_loss * lse * lse
        if distribution is not None:
            distribution[:, rows] = _distribution(log_p, y)
        if scale is not None and gradient is not None:
            factor = scale.expand(n)[rows] if weights is None else scale.expand(n)[rows] * weights[rows]
            _gradient(x, log_p, lse, y, factor, options, gradient[rows])
    invalid = ~valid
    if weights is not None:
        losses *= weights
    losses.masked_fill_(invalid, 0.0)
    if gradient is not None:
        _clear_rows(gradient, invalid)
    domains = inputs.token_domains()
    if sums is not None and domains is not None:
        entropy, correct, el2n = (None, None, None) if distribution is None else distribution
        n_bytes = None if inputs.token_bytes is None else inputs.token_bytes[classes[:, 0]]
        ignored = inputs.targets == options.ignore_index
        columns = {"entropy": entropy, "correct": correct, "el2n": el2n, "n_bytes": n_bytes}
        finite = losses.isfinite()
        add_tokens(
            sums, nll, domains, valid, ignored, finite=finite, reference_losses=inputs.reference_losses, **columns
        )
    return losses, losses.new_empty(SAVED, n), gradient


def backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    logits = inputs.logits
    valid = inputs.valid(options.ignore_index)
    classes = inputs.targets.where(valid, 0).long()[:, None]
    weights = inputs.weights()
    gradient = new_gradient(logits) if out is None else out
    factor = scale.expand(len(valid))
    if weights is not None:
        factor = factor * weights
    for rows, x, log_p in _log_softmax(logits, options.softcap, gradient):
        lse = torch.logsumexp(x, 1) if options.z_loss else None
        _gradient(x, log_p, lse, classes[rows], factor[rows], options, gradient[rows])
    _clear_rows(gradient, ~valid)
    return gradient


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    if gradient.is_cpu:
        return gradient if factor == 1 else gradient.mul_(factor.item())
    for rows in gradient.split(_chunk_rows(gradient)):
        rows.copy_(rows.to(factor.dtype).mul_(factor))
    return gradient


def _chunk_rows(logits: torch.Tensor) -> int:
    return max(1, _CHUNK // logits.shape[1])


def _log_softmax(
    logits: torch.Tensor, softcap: float, out: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows at a time: which, their logits (capped), and the log-probabilities of these.

    The latter stand in the rows of `out` if that has this dtype and is not the logits, else in scratch; the logits in
    scratch if they had to be changed. What is in scratch may be overwritten.
    """
    n, n_classes = logits.shape
    step = min(_chunk_rows(logits), n)
    dtype = loss_dtype(logits)
    direct = out is not None and out.dtype == dtype and out.data_ptr() != logits.data_ptr()
    scratch = None if direct else logits.new_empty(step, n_classes, dtype=dtype)
    widened = None if logits.dtype == dtype and not softcap else logits.new_empty(step, n_classes, dtype=dtype)
    for start in range(0, n, max(step, 1)):
        rows = slice(start, min(start + step, n))
        x = logits[rows]
        if widened is not None:
            x = widened[: len(x)].copy_(x)
            if softcap:
                x.div_(softcap).tanh_().mul_(softcap)
        log_p = scratch[: len(x)] if scratch is not None else out[rows]  # type: ignore[index]
        yield rows, x, torch.log_softmax(x, 1, out=log_p)


def _smoothed(nll: torch.Tensor, log_p: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return nll.lerp(-log_p.mean(1), label_smoothing) if label_smoothing else nll


def _distribution(log_p: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """[3, rows]: entropy, correct and el2n of `stats.STATISTICS`."""
    p = log_p.exp()
    entropy = -(p * log_p.clamp(min=-200.0)).sum(1)  # finite, so that 0 * log 0 is 0
    correct = log_p.gather(1, classes)[:, 0] >= log_p.amax(1)
    missing = 1.0 - p.gather(1, classes)
    el2n = p.square_().scatter_(1, classes, missing.square_()).sum(1).sqrt_()
    return torch.stack([entropy, correct.to(p.dtype), el2n])


def _gradient(
    x: torch.Tensor,
    log_p: torch.Tensor,
    lse: torch.Tensor | None,
    classes: torch.Tensor,
    factor: torch.Tensor,
    options: LossOptions,
    out: torch.Tensor,
) -> None:
    """Write the gradient of sum(factor * loss) of some rows to `out`; overwrites log_p, which may be `out`, and x.

    Of the rows' logits it is factor * (p * (1 + 2 * z_loss * lse) - (1 - smoothing) * onehot - smoothing / V), by the
    chain rule times 1 - (x / softcap)^2.
    """
    of_p = factor if lse is None else factor * (1.0 + 2.0 * options.z_loss * lse)
    g = log_p.exp_().mul_(of_p[:, None])
    if options.label_smoothing:
        g.sub_((factor * (options.label_smoothing / x.shape[1]))[:, None])
    g.scatter_add_(1, classes, factor[:, None] * (options.label_smoothing - 1.0))
    if options.softcap:
        g.mul_(x.div_(options.softcap).square_().neg_().add_(1.0))
    if g.data_ptr() != out.data_ptr():
        out.copy_(g)


def _clear_rows(gradient: torch.Tensor, rows: torch.Tensor) -> None:
    """Zero the rows where `rows` [N] is true, NaN included."""
    if not gradient.is_cpu:
        gradient.masked_fill_(rows[:, None], 0.0)
    elif rows.any():
        gradient[rows] = 0.0


def new_gradient(logits: torch.Tensor) -> torch.Tensor:
    """As `empty_gradient`, on a CPU in huge pages."""
    if not logits.is_cpu or logits.numel() == 0:
        return empty_gradient(logits)
    # Page faults of a fresh tensor cost as much as the arithmetic. numpy asks for huge pages, torch does not.
    n, n_classes = logits.shape
    pages = np.empty((n, gradient_stride(logits) * logits.element_size()), dtype=np.uint8)
    return torch.from_numpy(pages).view(logits.dtype)[:, :n_classes]
