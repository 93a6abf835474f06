"""The loss of a head as torch operators: what autograd and torch.compile see of it.

`mixloader::linear_reduced_loss` computes the gradients in the forward pass, from logits that are there anyway;
`mixloader::linear_token_losses` leaves them to `mixloader::linear_token_gradients` in the backward pass, which
computes the logits again. All are opaque to torch.compile; their fake implementations say what they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mixloader import loss_path
from mixloader.linear_chunks import (
    Gradients,
    Head,
    Needed,
    gradients_of,
    losses_and_gradients,
    losses_of,
    unwritten_logits,
)
from mixloader.loss_ops import INPUTS, OPTIONS, counted_once, graph_is_kept, once, reduced, scale_of
from mixloader.loss_path import LossInputs, LossOptions, loss_dtype

_HEAD = ["Tensor hidden", "Tensor weight", "Tensor? bias"]
_TENSORS = [*_HEAD, *INPUTS[1:]]
_ARGUMENTS = [*_TENSORS, *OPTIONS, "ScalarType dtype", "int chunk_bytes"]
_CALL = ", ".join(_ARGUMENTS)
_library = torch.library.Library("mixloader", "FRAGMENT")
_library.define(f"linear_token_losses({_CALL}, Tensor(a!)? sums) -> (Tensor losses, Tensor saved)")
_library.define(
    f"linear_token_gradients({_CALL}, Tensor saved, Tensor scale, bool[3] needed) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_reduced_loss({_CALL}, Tensor(a!)? sums, Tensor? divisor, bool[3] needed)"
    " -> (Tensor loss, Tensor, Tensor, Tensor)"
)


def linear_token_losses(
    head: Head, inputs: LossInputs, options: LossOptions, dtype: torch.dtype, sums: torch.Tensor | None
) -> torch.Tensor:
    """Losses [N]. Gradients are computed in the backward pass, exact for any upstream gradient.

    head: its tensors are made `dtype`, that of the logits. inputs: with unwritten logits.
    """
    *tensors, chunk_bytes = head
    return torch.ops.mixloader.linear_token_losses(*tensors, *inputs[1:], *options, dtype, chunk_bytes, sums)[0]


def linear_reduced_loss(
    head: Head,
    inputs: LossInputs,
    options: LossOptions,
    dtype: torch.dtype,
    sums: torch.Tensor | None,
    divisor: torch.Tensor | None,
) -> torch.Tensor:
    """Sum of the losses over a divisor, with gradients from the forward pass. Arguments as of `linear_token_losses`."""
    *tensors, chunk_bytes = head
    needed = [tensor is not None and tensor.requires_grad for tensor in tensors]
    arguments = (*tensors, *inputs[1:], *options, dtype, chunk_bytes, sums, divisor, needed)
    return torch.ops.mixloader.linear_reduced_loss(*arguments)[0]


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            losses, saved = torch.ops.mixloader.linear_token_losses(*arguments)
        ctx.save_for_backward(*arguments[: len(_TENSORS)], saved)
        ctx.options = arguments[len(_TENSORS) : len(_ARGUMENTS)]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return losses, saved

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[: len(_HEAD)]
        with torch.no_grad():
            gradients = torch.ops.mixloader.linear_token_gradients(
                *tensors, *ctx.options, saved, upstream.contiguous(), needed
            )
        return _returned(gradients, ctx.needs_input_grad)


class _ReducedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, *gradients = torch.ops.mixloader.linear_reduced_loss(*arguments)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor if tensor is None else tensor.dtype for tensor in arguments[: len(_HEAD)]]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        return loss, *gradients

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            gradients = [
                _scaled(gradient, upstream, dtype) if needed else gradient
                for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
            ]
        return _returned(gradients, ctx.needs_input_grad)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """gradient * factor, of a dtype; in place unless another backward pass will read the gradient."""
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    if graph_is_kept():
        gradient = gradient.clone()
    rows = gradient if gradient.ndim == 2 else gradient[None]
    loss_path.path_of(rows).rescale(rows, factor)
    return gradient.to(dtype)


def _returned(gradients: Sequence[torch.Tensor], needed: Sequence[bool]) -> tuple[torch.Tensor | None, ...]:
    """What a backward pass returns: the gradients of the head, and nothing for the other arguments."""
    of_head = [once(gradient) if needed[i] else None for i, gradient in enumerate(gradients)]
    return *of_head, *(None for _ in needed[len(_HEAD) :])


def _parsed(arguments: Sequence[Any]) -> tuple[Head, LossInputs, LossOptions]:
    """The arguments of any of the operators. What of the head is of another dtype than the logits is copied."""
    hidden, weight, bias = arguments[: len(_HEAD)]
    *options, dtype, chunk_bytes = arguments[len(_TENSORS) : len(_ARGUMENTS)]
    head = Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), chunk_bytes)
    logits = unwritten_logits(hidden.shape[:1], weight.shape[0], dtype, hidden.device)
    return head, LossInputs(logits, *arguments[len(_HEAD) : len(_TENSORS)]), LossOptions(*options)


def _token_losses(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return losses_of(*_parsed(arguments), counted_once(arguments[-1]))


def _token_losses_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, inputs, _ = _parsed(arguments)
    logits = inputs.logits
    losses = logits.new_empty(logits.shape[0], dtype=loss_dtype(logits))
    return losses, losses.new_empty(loss_path.path_of(logits).SAVED, logits.shape[0])


def _token_gradients(*arguments: Any) -> tuple[torch.Tensor, ...]:
    saved, scale, needed = arguments[-3:]
    return _rounded(gradients_of(*_parsed(arguments), saved, scale, Needed(*needed)), arguments)


def _token_gradients_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    head, _, _ = _parsed(arguments)
    return _rounded(Gradients(head, Needed(*arguments[-1])), arguments)


def _rounded(gradients: Gradients, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """The gradients of a head in the dtypes of its tensors, the first of the arguments."""
    return tuple(
        gradient if tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients.tensors(), arguments, strict=False)
    )


def _reduced_loss(*arguments: Any) -> tuple[torch.Tensor, ...]:
    sums, divisor, needed = arguments[-3:]
    head, inputs, options = _parsed(arguments)
    scale = scale_of(divisor, inputs.logits)
    losses, gradients = losses_and_gradients(head, inputs, options, counted_once(sums), scale, Needed(*needed))
    return reduced(losses, divisor), *gradients.tensors()


def _reduced_loss_fake(*arguments: Any) -> tuple[torch.Tensor, ...]:
    head, inputs, _ = _parsed(arguments)
    loss = inputs.logits.new_empty((), dtype=loss_dtype(inputs.logits))
    return loss, *Gradients(head, Needed(*arguments[-1])).tensors()


_library.impl("linear_token_losses", _token_losses, "CompositeExplicitAutograd")
_library.impl("linear_token_losses", _TokenLosses.apply, "Autograd")
torch.library.register_fake("mixloader::linear_token_losses", _token_losses_fake, lib=_library)
_library.impl("linear_token_gradients", _token_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("mixloader::linear_token_gradients", _token_gradients_fake, lib=_library)
_library.impl("linear_reduced_loss", _reduced_loss, "CompositeExplicitAutograd")
_library.impl("linear_reduced_loss", _ReducedLoss.apply, "Autograd")
torch.library.register_fake("mixloader::linear_reduced_loss", _reduced_loss_fake, lib=_library)
