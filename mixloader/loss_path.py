"""One call of the loss as data, and what a module must have to compute it.

`mixloader.loss` checks what its caller gave and turns it into LossInputs and LossOptions. A path computes from these:
`mixloader.kernels.cross_entropy` on CUDA, `mixloader.loss_cpu` on a CPU, `mixloader.loss_torch` everywhere. `path_of`
chooses.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple, Protocol, cast

import torch


class LossOptions(NamedTuple):
    """What the loss of a token is. An option added here reaches every path and both custom operators by itself.

    The loss of a row x with target y, after x = softcap * tanh(x / softcap) unless softcap is 0, is
    weight * ((1 - label_smoothing) * nll(y) + label_smoothing * mean over c of nll(c) + z_loss * lse^2) with
    lse = log(sum(exp(x))) and nll(c) = lse - x[c]. distribution: whether statistics include entropy, correct and el2n.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    distribution: bool = False


class LossInputs(NamedTuple):
    """The tensors of a call, checked, on one device.

    logits: [N, V], float32, bfloat16, float16 or float64, of any strides. targets: [N], int64 or int32, contiguous.
    domain_ids: [B], int64 or int32, contiguous, each for N / B consecutive rows; needed with sums and domain_weights.
    token_weights: [N], domain_weights: [D], reference_losses: [N], all contiguous and of the dtype of the losses. A
    domain id without a weight has weight 1. token_bytes: int32 [V] or longer, contiguous.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    domain_ids: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    domain_weights: torch.Tensor | None = None
    reference_losses: torch.Tensor | None = None
    token_bytes: torch.Tensor | None = None

    def valid(self, ignore_index: int) -> torch.Tensor:
        """bool [N]: the target is a class, and not the ignored one."""
        return is_valid(self.targets, self.logits.shape[1], ignore_index)

    def token_domains(self) -> torch.Tensor | None:
        """[N]: the domain id of each row."""
        if self.domain_ids is None:
            return None
        return self.domain_ids[:, None].expand(-1, self.rows_per_id).reshape(-1)

    def weights(self) -> torch.Tensor | None:
        """[N]: the weight of each row, by token and by domain; None for 1."""
        weights, domains = self.token_weights, self.token_domains()
        if self.domain_weights is not None and domains is not None:
            known = (domains >= 0) & (domains < len(self.domain_weights))
            by_domain = self.domain_weights[domains.where(known, 0)].where(known, 1.0)
            weights = by_domain if weights is None else weights * by_domain
        return weights

    @property
    def rows_per_id(self) -> int:
        """Consecutive rows that share a domain id."""
        return 1 if self.domain_ids is None else len(self.targets) // max(len(self.domain_ids), 1)


class LossPath(Protocol):
    """The functions of a path. Arithmetic is float32 (float64 for float64 logits), whatever the dtype of the logits.

    Rows whose target is not valid have loss 0 and gradient 0, even if their logits are NaN. A `gradient` is [N, V] in
    the dtype of the logits, rounded once; it is written to `out` if that is given (the logits themselves, for a
    gradient in place), else to `empty_gradient`. `scale` is [1] or [N] in the dtype of the losses: the gradient is
    that of sum(scale * losses). `sums` is the buffer of a DomainStats, to which tokens are added as
    `stats.add_tokens` does.
    """

    @property
    def SAVED(self) -> int:
        """Numbers of each row that `forward` hands to `backward`."""

    def forward(
        self,
        inputs: LossInputs,
        options: LossOptions,
        sums: torch.Tensor | None,
        scale: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Losses [N], what `backward` needs besides its other arguments [SAVED, N], a gradient if there is a scale."""

    def backward(
        self,
        inputs: LossInputs,
        options: LossOptions,
        saved: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gradient."""

    def valid_count(self, targets: torch.Tensor, n_classes: int, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
        """Number n of valid targets, and 1 / max(n, 1): [2], of `dtype`, that of the losses."""

    def rescale(self, gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """gradient * factor, rounded once, in place; factor is a scalar tensor in the dtype of the losses."""


def path_of(logits: torch.Tensor) -> LossPath:
    """The path that computes these rows."""
    if logits.is_cuda and logits.dtype != torch.float64 and _has_triton():
        from mixloader.kernels import cross_entropy

        return cast(LossPath, cross_entropy)
    if logits.is_cpu and logits.dtype != torch.float64:
        from mixloader import loss_cpu

        return cast(LossPath, loss_cpu)
    from mixloader import loss_torch

    return loss_torch


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def loss_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def is_valid(targets: torch.Tensor, n_classes: int, ignore_index: int) -> torch.Tensor:
    return (targets >= 0) & (targets < n_classes) & (targets != ignore_index)


def gradient_stride(logits: torch.Tensor) -> int:
    """Elements from row to row of a gradient: as in logits [N, V] where those are padded, so that both are aligned."""
    n_classes = logits.shape[1]
    padded = logits.stride(1) == 1 and n_classes < logits.stride(0) < 2 * n_classes
    return logits.stride(0) if padded else n_classes


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the shape, dtype and device of logits [N, V]."""
    return torch.empty_strided(logits.shape, (gradient_stride(logits), 1), dtype=logits.dtype, device=logits.device)
