"""The losses and gradients of a head, some rows at a time, so that its logits never stand in memory as a whole.

The logits of a chunk of rows are a matrix product into a buffer that the next chunk overwrites. A path of the loss
(`mixloader.loss_path`) turns them into losses and, in place, into their gradient, from which two more products make
the gradients of the chunk's hidden states and, added up over the chunks, of the weight. The products are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from mixloader import loss_path
from mixloader.loss_path import LossInputs, LossOptions, loss_dtype

_ALIGNMENT = 64
"""Elements to a multiple of which rows of the logits are padded: GPUs multiply matrices of unaligned rows slowly."""
_ROWS = 128
"""Rows to a multiple of which a chunk is rounded up: the tiles of a GPU's matrix product."""
_WIDENED = 1 << 20
"""Elements of a gradient that are widened at once where the product cannot widen them itself: 4 MB of float32."""


class Head(NamedTuple):
    """What logits come from: hidden [N, H] @ weight [V, H].T + bias [V], of one dtype, which is that of the logits.

    chunk_bytes: of the buffer of logits, which has at least one row.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    chunk_bytes: int


class Needed(NamedTuple):
    """Whose gradients somebody wants."""

    hidden: bool
    weight: bool
    bias: bool


def unwritten_logits(rows: torch.Size, n_classes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[*rows, V]: a tensor of the shape, dtype and device of the logits, without their memory."""
    return torch.empty((1,) * (len(rows) + 1), dtype=dtype, device=device).expand(*rows, n_classes)


def losses_of(
    head: Head, inputs: LossInputs, options: LossOptions, sums: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [N], and what the path wants to be handed for their gradient [SAVED, N]. `inputs`: unwritten logits."""
    path = loss_path.path_of(inputs.logits)
    losses = head.hidden.new_empty(len(head.hidden), dtype=loss_dtype(inputs.logits))
    saved = losses.new_empty(path.SAVED, len(losses))
    for rows, chunk in _chunks(head, inputs):
        losses[rows], saved[:, rows], _ = path.forward(chunk, options, sums, None, None)
    return losses, saved


def losses_and_gradients(
    head: Head,
    inputs: LossInputs,
    options: LossOptions,
    sums: torch.Tensor | None,
    scale: torch.Tensor,
    needed: Needed,
) -> tuple[torch.Tensor, Gradients]:
    """Losses [N], and the gradients of sum(scale * losses). scale: [1], of the dtype of the losses."""
    path = loss_path.path_of(inputs.logits)
    losses = head.hidden.new_empty(len(head.hidden), dtype=loss_dtype(inputs.logits))
    gradients = Gradients(head, needed)
    for rows, chunk in _chunks(head, inputs):
        losses[rows], _, of_logits = path.forward(chunk, options, sums, scale, chunk.logits)
        gradients.add(rows, of_logits)
    return losses, gradients


def gradients_of(
    head: Head, inputs: LossInputs, options: LossOptions, saved: torch.Tensor, scale: torch.Tensor, needed: Needed
) -> Gradients:
    """The gradients of sum(scale * losses), scale [N], from what `losses_of` saved. Computes the logits again."""
    path = loss_path.path_of(inputs.logits)
    gradients = Gradients(head, needed)
    for rows, chunk in _chunks(head, inputs):
        of_logits = path.backward(chunk, options, saved[:, rows].contiguous(), scale[rows], chunk.logits)
        gradients.add(rows, of_logits)
    return gradients


class Gradients:
    """Gradients of a head, added up over its chunks; None for what nobody needs.

    hidden: [N, H], of the head's dtype. weight: [V, H] and bias: [V], of the dtype of the losses whatever theirs is.
    """

    def __init__(self, head: Head, needed: Needed) -> None:
        self._head = head
        hidden, weight = head.hidden, head.weight
        dtype = loss_dtype(hidden)
        self.hidden = hidden.new_empty(hidden.shape) if needed.hidden else None
        self.weight = torch.empty(weight.shape, dtype=dtype, device=weight.device) if needed.weight else None
        self.bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needed.bias else None

    def add(self, rows: slice, of_logits: torch.Tensor | None) -> None:
        """Take the gradient of the logits of some rows, the first ones first."""
        assert of_logits is not None
        if self.hidden is not None:
            torch.mm(of_logits, self._head.weight, out=self.hidden[rows])
        if self.weight is None and self.bias is None:
            return
        for classes, part in _wide_enough(of_logits):
            if self.weight is not None:
                _add_product(self.weight[classes], part, self._head.hidden[rows], first=rows.start == 0)
            if self.bias is not None:
                self.bias[classes] += part.sum(0, dtype=self.bias.dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Those of hidden, weight and bias, with an empty tensor where nobody needs one."""
        return tuple(
            self._head.hidden.new_empty(0) if gradient is None else gradient
            for gradient in (self.hidden, self.weight, self.bias)
        )


def _padded(n_classes: int) -> int:
    return -(-n_classes // _ALIGNMENT) * _ALIGNMENT


def logits_row_bytes(n_classes: int, element_size: int) -> int:
    """Of a row of logits in the buffer of a chunk."""
    return _padded(n_classes) * element_size


def chunk_rows(n: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk: as few chunks as the bytes allow, of nearly the same size."""
    n = max(1, n)
    most = max(1, min(n, chunk_bytes // row_bytes))
    rows = -(-n // -(-n // most))
    return min(most, -(-rows // _ROWS) * _ROWS)


def _chunks(head: Head, inputs: LossInputs) -> Iterator[tuple[slice, LossInputs]]:
    """Which rows, and their inputs, with logits in a buffer that the next chunk overwrites. Without rows, one chunk."""
    n, n_classes = inputs.logits.shape
    step = chunk_rows(n, logits_row_bytes(n_classes, head.hidden.element_size()), head.chunk_bytes)
    buffer = head.hidden.new_empty(step, _padded(n_classes))[:, :n_classes]
    domains = inputs.token_domains()
    if domains is not None:
        domains = domains.contiguous()  # which the one id of a batch of one row is not
    for start in range(0, max(n, 1), step):
        rows = slice(start, min(start + step, n))
        logits = buffer[: rows.stop - start]
        if head.bias is None:
            torch.mm(head.hidden[rows], head.weight.t(), out=logits)
        else:
            torch.addmm(head.bias, head.hidden[rows], head.weight.t(), out=logits)
        chunk = inputs._replace(
            logits=logits,
            targets=inputs.targets[rows],
            domain_ids=None if domains is None else domains[rows],
            token_weights=None if inputs.token_weights is None else inputs.token_weights[rows],
            reference_losses=None if inputs.reference_losses is None else inputs.reference_losses[rows],
        )
        yield rows, chunk


def _wide_enough(of_logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The gradient of all classes, or of some at a time, widened, so that its products add up in float32."""
    dtype = loss_dtype(of_logits)
    n, n_classes = of_logits.shape
    if of_logits.dtype == dtype or _widens(of_logits):
        yield slice(0, n_classes), of_logits
        return
    step = max(1, _WIDENED // max(n, 1))
    for start in range(0, n_classes, step):
        classes = slice(start, start + step)
        yield classes, of_logits[:, classes].to(dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, first: bool) -> None:
    """total += left.T @ right, in the precision of `total`; with `first`, what `total` held before does not matter."""
    beta = 0 if first else 1
    if left.dtype == total.dtype:
        torch.addmm(total, left.t(), right.to(total.dtype), beta=beta, out=total)
    else:
        torch.addmm(total, left.t(), right, total.dtype, beta=beta, out=total)


def _widens(matrix: torch.Tensor) -> bool:
    """True if torch multiplies matrices like this one into a float32 sum without rounding the product first."""
    return matrix.is_cuda and torch.__version__ >= (2, 10)  # type: ignore[operator]
