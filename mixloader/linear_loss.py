"""The loss of a model's head, from hidden states: the logits, the largest tensor of a training step, are never whole.

`linear_chunks.py` is the arithmetic, `linear_ops.py` what autograd and torch.compile see of it; options, statistics and
paths are those of `loss.py`.
"""

from __future__ import annotations

import torch

from mixloader.linear_chunks import Head, logits_row_bytes, unwritten_logits
from mixloader.linear_ops import linear_reduced_loss, linear_token_losses
from mixloader.loss_arguments import FLOAT_DTYPES, LossModule, check_device, check_dtype, loss_call, tell_influence
from mixloader.loss_ops import reduced
from mixloader.stats import DomainStats

_CHUNK_BYTES = {"cuda": 1 << 29, "cpu": 1 << 24}
"""Of logits that are in memory at a time, by type of device; others as "cuda"."""
_CHUNK_ROWS = 128
"""Whose logits are in memory at least: each chunk reads and writes the whole gradient of the weight. With 128,256
classes on a CPU, chunks of 31 rows took 1.4 times as long as chunks of 128, and those 1.03 times as chunks of 256."""


def default_chunk_bytes(n_classes: int, element_size: int, device_type: str) -> int:
    """Memory for logits of so many classes, each of `element_size` bytes, where the caller does not say."""
    return max(
        _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cuda"]), _CHUNK_ROWS * logits_row_bytes(n_classes, element_size)
    )


def linear_domain_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    domain_ids: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
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
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """`domain_cross_entropy` of the logits hidden @ weight.T + bias, of which only a chunk is in memory at a time.

    hidden: [N, H] or [B, T, H]. weight: [V, H], that of the head: `model.lm_head.weight`, tied to the embedding or
        not; of a padded vocabulary, weight[:V]. bias: [V]. All float32, bfloat16, float16 or float64, of one dtype,
        which is that of the logits; under autocast they are of its dtype, as in torch.nn.functional.linear.
    chunk_bytes: memory for logits, at least that of one row; by default 0.5 GB, 16 MB on a CPU, or that of 128
        rows if it is more. Fewer and larger chunks read and write the weight's gradient less often.
    All other arguments are those of `domain_cross_entropy`, and mean what they mean there.

    The gradients of weight and bias are added up in float32 (float64) over the chunks, whatever the dtype, and rounded
    once. With "mean" and "sum" all gradients are computed in the forward pass, also under torch.compile, and those of
    hidden and weight (not of the logits) scaled by the upstream gradient in the backward pass. With "none" and for
    float16, where unscaled gradients would underflow, the backward pass computes the logits again: a third more
    arithmetic, exact for any upstream gradient. Beside results and chunk, a weight that autocast has to convert is in
    memory twice, and so is, of another dtype than float32, its gradient.

    The same token losses give the same sums in `stats` bit for bit, whatever the chunks; that the losses are the same
    is up to the matrix product, which may add in another order for another number of rows. Row 0 * NaN = NaN of
    torch's product holds here, too: NaN in `hidden` reaches the weight's gradient even if its target is ignored.

    Raises what `domain_cross_entropy` raises. Under FSDP, call it where the weight is whole: in a forward method.
    """
    dtype = _check_head(hidden, weight, bias)
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(weight.shape[0], dtype.itemsize, hidden.device.type)
    elif not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes!r}; expected a whole number of at least 1, or None")
    call = loss_call(
        unwritten_logits(hidden.shape[:-1], weight.shape[0], dtype, hidden.device),
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
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, chunk_bytes)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head[:3])
    if reduction != "none" and differentiable and dtype != torch.float16:
        loss = linear_reduced_loss(head, inputs, options, dtype, sums, divisor)
    else:
        losses = linear_token_losses(head, inputs, options, dtype, sums)
        loss = losses.view(targets.shape) if reduction == "none" else reduced(losses, divisor)
    tell_influence(stats, loss, call)
    return loss


class LinearDomainCrossEntropy(LossModule):
    """`linear_domain_cross_entropy` with its options kept: what stays the same from batch to batch is given here.

    stats: a DomainStats or None. options: ignore_index, label_smoothing, z_loss, softcap, reduction, chunk_bytes and
    domain_weights, as for the function. The head's weight is no parameter of this module: it is given to each call.
    `stats` is no buffer of the module: it does not move with `to`, nor is it in the state.
    """

    OPTIONS = (*LossModule.OPTIONS, "chunk_bytes")

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        domain_ids: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        reference_losses: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        denominator: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        return linear_domain_cross_entropy(
            hidden,
            weight,
            targets,
            domain_ids,
            bias=bias,
            document_ids=document_ids,
            stats=self.stats,
            reference_losses=reference_losses,
            domain_weights=self.domain_weights,
            token_weights=token_weights,
            denominator=denominator,
            **self.options,
        )


def _check_head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype:
    """The dtype of the logits."""
    check_dtype("hidden states", hidden, FLOAT_DTYPES)
    check_dtype("weights of the head", weight, FLOAT_DTYPES)
    if hidden.ndim < 2 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden states have shape {list(hidden.shape)}; expected [N, H] or [B, T, H], H at least 1")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weights of the head have shape {list(weight.shape)}; expected [V, {hidden.shape[-1]}], one row of the "
            f"hidden states' width for each class"
        )
    check_device("weights of the head", weight.device, hidden.device)
    if bias is not None:
        check_dtype("biases of the head", bias, FLOAT_DTYPES)
        check_device("biases of the head", bias.device, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"biases of the head have shape {list(bias.shape)}; expected {list(weight.shape[:1])}")
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(hidden.device.type)
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TypeError(f"hidden states, weights and biases of the head are {names}; expected one dtype, or autocast")
    return hidden.dtype
