"""Cross-entropy that also adds every token's loss to its domain's sums, in the same pass over the logits.

float32, bfloat16 and float16 logits on a CUDA device go through the Triton kernel, on a CPU through the C++ core;
everything else (float64, other devices, CUDA without Triton) through plain torch, with the same meaning and the same
integer sums. `loss_arguments.py` checks what is given; `loss_ops.py` is what autograd and torch.compile see,
`loss_path.py` what a path is.
"""

from __future__ import annotations

import torch

from mixloader.loss_arguments import LossModule, loss_call, tell_influence
from mixloader.loss_ops import ReducedLoss, reduced, token_losses
from mixloader.stats import DomainStats


def domain_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    domain_ids: torch.Tensor | None = None,
    *,
    document_ids: torch.Tensor | None = None,
    stats: DomainStats | None = None,
    reference_losses: torch.Tensor | None = None,
    domain_weights: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    denominator: torch.Tensor | float | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Cross-entropy in nats between logits and targets; adds token losses to `stats` by domain.

    logits: [N, V] or [B, T, V], float32, bfloat16, float16 or float64, of any strides.
    targets: [N] or [B, T], int64 or int32, the class of each row; `ignore_index` for none.
    domain_ids: int64 or int32, of the shape of targets, or [B] with one id for all tokens of a row of [B, T]. An id of
        -1 counts nowhere. Needed only with `stats` and `domain_weights`.
    document_ids: int64 or int32, of the shape of targets: the document of each token. domain_ids are then [K], one for
        each document, or [B, K] for documents numbered from 0 in each row, as a batch of the loader has them.
    stats: where to add. Nothing is added outside grad mode, while `stats.paused()`, or by a recomputation of
        activation checkpointing (see DomainStats).
    reference_losses: of the shape of targets, the losses of another model, for the statistic "excess".
    domain_weights: float [D], token_weights: float, of the shape of targets: factors of the loss of each token, 1 for
        a domain id outside of [0, D). Taken as constants. Statistics are those of the plain loss.
    label_smoothing: in [0, 1]: so much of the loss is that of the mean over all classes, as in torch.
    z_loss: adds z_loss * logsumexp(logits)^2 to the loss of each token.
    softcap: the logits become softcap * tanh(logits / softcap) first.
    reduction: "mean" is sum(weight * loss) over the number of valid targets, whatever the weights; "sum"; or "none"
        (the shape of targets).
    denominator: one number, on the device to spare a transfer, that "mean" divides by instead: the targets of all
        micro-batches of a step, say. Taken as a constant.
    in_place: the logits may be overwritten with their gradient, which saves the memory of a second tensor of their
        size. Do not use them afterwards; autograd raises if somebody else saved them. torch.compile plans memory
        itself.

    Returns float32 (float64 for float64 logits) whatever the dtype of the logits, also under autocast. Gradients have
    the dtype of the logits. With "mean" and "sum" they are computed in the forward pass and scaled in the backward
    pass if the upstream gradient is not 1, except under torch.compile and for float16, where that would underflow
    before a gradient scaler can help; then, and with "none", they are computed in the backward pass, in float32 and
    rounded once. Differentiable once.

    A target that is neither a class nor ignore_index has loss 0 and gradient 0, like an ignored one, is left out of
    the mean and is counted as a bad token in `stats`, as is a NaN or infinite loss (which does reach the returned
    loss) and a domain id below -1 or at or above n_domains (which changes nothing else). `StatsSnapshot.wait` raises
    for them; without `stats`, bad targets go unnoticed. The mean of no valid target is NaN, as in torch, with
    gradient 0. Nothing waits for the device. A token's loss does not depend on the other tokens; with the Triton
    kernel it may differ in the last bits with the token's position if rows are not whole multiples of 16 bytes.

    Raises TypeError for a wrong dtype, PlacementError for a DTensor and ValueError for wrong shapes, devices or
    options, before any work.
    """
    call = loss_call(
        logits,
        targets,
        domain_ids,
        document_ids=document_ids,
        stats=stats,
        reference_losses=reference_losses,
        domain_weights=domain_weights,
        token_weights=token_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        denominator=denominator,
    )
    inputs, options, sums, divisor = call
    compiling = torch.compiler.is_compiling()
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    if reduction != "none" and differentiable and logits.dtype != torch.float16 and not compiling:
        loss = ReducedLoss.apply(inputs.logits, inputs, options, sums, divisor, in_place)
    else:
        losses = token_losses(inputs, options, sums, in_place and not compiling)
        loss = losses.view(targets.shape) if reduction == "none" else reduced(losses, divisor)
    tell_influence(stats, loss, call)
    return loss


class DomainCrossEntropy(LossModule):
    """`domain_cross_entropy` with its options kept: what stays the same from batch to batch is given here.

    stats: a DomainStats or None. options: ignore_index, label_smoothing, z_loss, softcap, reduction, in_place and
    domain_weights, as for the function. `stats` is no buffer of the module: it does not move with `to`, nor is it
    in the state.
    """

    OPTIONS = (*LossModule.OPTIONS, "in_place")

    def forward(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        domain_ids: torch.Tensor | None = None,
        *,
        document_ids: torch.Tensor | None = None,
        reference_losses: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        denominator: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        return domain_cross_entropy(
            logits,
            targets,
            domain_ids,
            document_ids=document_ids,
            stats=self.stats,
            reference_losses=reference_losses,
            domain_weights=self.domain_weights,
            token_weights=token_weights,
            denominator=denominator,
            **self.options,
        )
