"""The loss as torch operators: what autograd and torch.compile see of it.

`mixloader::token_losses` and `mixloader::token_gradient` are opaque to torch.compile, which keeps them in its graph:
their fake implementations say what they return. `ReducedLoss` computes the gradient in the forward pass; it is for
eager mode, where it saves one reading of the logits.
"""

from __future__ import annotations

from typing import Any

import torch

from mixloader import loss_path
from mixloader.loss_path import LossInputs, LossOptions
from mixloader.stats import recomputing

_ONCE = (
    "the gradient of domain_cross_entropy or linear_domain_cross_entropy cannot be differentiated again: these losses "
    "were made for first-order training. Use torch.nn.functional.cross_entropy where second derivatives are needed"
)
_N_INPUTS, _N_OPTIONS = len(LossInputs._fields), len(LossOptions._fields)

_KINDS = {bool: "bool", int: "int", float: "float"}
INPUTS = [f"Tensor{'?' * (name in LossInputs._field_defaults)} {name}" for name in LossInputs._fields]
OPTIONS = [f"{_KINDS[type(value)]} {name}" for name, value in LossOptions._field_defaults.items()]
"""Of LossInputs and LossOptions, what stands in the schema of an operator that takes them."""
_ARGUMENTS = ", ".join([*INPUTS, *OPTIONS])
_library = torch.library.Library("mixloader", "DEF")
_library.define(f"token_losses({_ARGUMENTS}, Tensor(a!)? sums, bool in_place) -> (Tensor losses, Tensor saved)")
_library.define(f"token_gradient({_ARGUMENTS}, Tensor saved, Tensor scale) -> Tensor")


def token_losses(inputs: LossInputs, options: LossOptions, sums: torch.Tensor | None, in_place: bool) -> torch.Tensor:
    """Losses [N]. The gradient is computed in the backward pass, exact for any upstream gradient and rounded once."""
    losses, _ = torch.ops.mixloader.token_losses(*inputs, *options, sums, in_place)
    return losses


def reduced(losses: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    """The sum of the losses, over a divisor if there is one ([2]: it, and its inverse)."""
    return losses.sum() if divisor is None else losses.sum() / divisor[0]


def scale_of(divisor: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """[1]: the gradient of `reduced` by each loss, for logits of this dtype and device."""
    return torch.ones(1, dtype=loss_path.loss_dtype(logits), device=logits.device) if divisor is None else divisor[1:]


class ReducedLoss(torch.autograd.Function):
    """Sum of the losses over a divisor, with the gradient computed in the forward pass: the logits need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        inputs: LossInputs,
        options: LossOptions,
        sums: torch.Tensor | None,
        divisor: torch.Tensor | None,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.path = loss_path.path_of(logits)
        out = _gradient_in_place(logits) if in_place else None
        losses, _, gradient = ctx.path.forward(inputs, options, counted_once(sums), scale_of(divisor, logits), out)
        ctx.save_for_backward(gradient)
        return reduced(losses, divisor)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The saved gradient may be scaled in place only if no further backward pass will read it.
        if graph_is_kept():
            gradient = gradient.clone()
        with torch.no_grad():
            gradient = ctx.path.rescale(gradient, upstream)
        return once(gradient), None, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            losses, saved = torch.ops.mixloader.token_losses(*arguments)
        ctx.save_for_backward(*arguments[:_N_INPUTS], saved)
        ctx.options = arguments[_N_INPUTS:][:_N_OPTIONS]
        ctx.in_place = arguments[-1]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return losses, saved

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        rest = [None] * (_N_INPUTS + _N_OPTIONS + 1)
        if upstream is None:
            return None, *rest
        *tensors, saved = ctx.saved_tensors
        arguments = (*tensors, *ctx.options, saved, upstream.contiguous())
        with torch.no_grad():
            if ctx.in_place and not graph_is_kept():
                return _token_gradient(*arguments, in_place=True), *rest
            gradient = torch.ops.mixloader.token_gradient(*arguments)
        return once(gradient), *rest


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> None:
        raise RuntimeError(_ONCE)


def once(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient; where somebody records it (create_graph), with a node that refuses to be differentiated."""
    return _Once.apply(gradient, torch.empty(0, requires_grad=True)) if torch.is_grad_enabled() else gradient


def _token_losses(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, options = LossInputs(*arguments[:_N_INPUTS]), LossOptions(*arguments[_N_INPUTS:-2])
    path = loss_path.path_of(inputs.logits)
    losses, saved, _ = path.forward(inputs, options, counted_once(arguments[-2]), None, None)
    return losses, saved


def _token_losses_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = arguments[0]
    losses = logits.new_empty(logits.shape[0], dtype=loss_path.loss_dtype(logits))
    return losses, losses.new_empty(loss_path.path_of(logits).SAVED, logits.shape[0])


def _token_gradient(*arguments: Any, in_place: bool = False) -> torch.Tensor:
    inputs, options = LossInputs(*arguments[:_N_INPUTS]), LossOptions(*arguments[_N_INPUTS:-2])
    saved, scale = arguments[-2:]
    out = _gradient_in_place(inputs.logits) if in_place else None
    return loss_path.path_of(inputs.logits).backward(inputs, options, saved, scale, out)


def counted_once(sums: torch.Tensor | None) -> torch.Tensor | None:
    # Here and not where the graph is made: a compiled graph runs both first and as a recomputation.
    return None if sums is None or recomputing() else sums


def graph_is_kept() -> bool:
    """True in a backward pass after which another may read the same saved tensors."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _gradient_in_place(logits: torch.Tensor) -> torch.Tensor | None:
    """The logits as the tensor for their gradient, or None where classes are not neighbours or rows overlap."""
    if logits.stride(1) != 1 or (logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]):
        return None
    # Whoever saved the logits for the backward pass is told by autograd that they have changed.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


_library.impl("token_losses", _token_losses, "CompositeExplicitAutograd")
_library.impl("token_losses", _TokenLosses.apply, "Autograd")
torch.library.register_fake("mixloader::token_losses", _token_losses_fake, lib=_library)
_library.impl("token_gradient", _token_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mixloader::token_gradient", lambda *arguments: loss_path.empty_gradient(arguments[0]), lib=_library
)
