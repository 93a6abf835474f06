"""What a caller gives a loss, checked and turned into what the paths take.

`loss_call` does so for `domain_cross_entropy` and `linear_domain_cross_entropy`: whatever both take means the same to
both, and is refused in the same words.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from mixloader import loss_path, loss_torch
from mixloader.errors import PlacementError
from mixloader.loss_path import LossInputs, LossOptions, loss_dtype
from mixloader.stats import DomainStats

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INDEX_DTYPES = (torch.int64, torch.int32)
_REDUCTIONS = ("mean", "sum", "none")


class LossCall(NamedTuple):
    """A call of a loss. sums: the buffer to add statistics to, or None. divisor: as of `_divisor`."""

    inputs: LossInputs
    options: LossOptions
    sums: torch.Tensor | None
    divisor: torch.Tensor | None


def loss_call(
    logits: torch.Tensor,
    targets: torch.Tensor,
    domain_ids: torch.Tensor | None,
    *,
    document_ids: torch.Tensor | None,
    stats: DomainStats | None,
    reference_losses: torch.Tensor | None,
    domain_weights: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    denominator: torch.Tensor | float | None,
) -> LossCall:
    """The arguments of `domain_cross_entropy`, checked; raises as it says. Nothing reads what the logits hold."""
    _check_logits(logits, targets)
    _check_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    _check_domains(logits, targets, domain_ids, document_ids)
    _check_stats(logits, domain_ids, stats, domain_weights, reference_losses)
    dtype = loss_dtype(logits)
    inputs = LossInputs(
        logits=logits.reshape(-1, logits.shape[-1]),
        targets=targets.reshape(-1).contiguous(),
        domain_ids=_ids_of_rows(domain_ids, document_ids),
        token_weights=_constants("token_weights", token_weights, targets.shape, logits, dtype),
        domain_weights=_constants("domain_weights", domain_weights, None, logits, dtype),
        reference_losses=_constants("reference_losses", reference_losses, targets.shape, logits, dtype),
        token_bytes=None if stats is None else stats.token_bytes,
    )
    distribution = stats is not None and stats.distribution
    options = LossOptions(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0), distribution)
    sums = stats.buffer if stats is not None and stats.enabled() else None
    return LossCall(inputs, options, sums, _divisor(inputs, options, reduction, denominator, dtype))


def tell_influence(stats: DomainStats | None, loss: torch.Tensor, call: LossCall) -> None:
    """Say whose rows a counted loss came of, if somebody measures influence."""
    if stats is None or call.sums is None or stats.influence is None or torch.compiler.is_compiling():
        return
    inputs, divisor = call.inputs, None if call.divisor is None else call.divisor[0]
    assert inputs.domain_ids is not None
    stats.influence.rows(loss, inputs.domain_ids, divisor, inputs.domain_weights)


class LossModule(torch.nn.Module):
    """A loss with its options kept, of the names in OPTIONS: what stays the same from batch to batch.

    `stats` is no buffer of the module: it does not move with `to`, nor is it in the state.
    """

    OPTIONS: tuple[str, ...] = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction", "domain_weights")
    domain_weights: torch.Tensor | None

    def __init__(self, stats: DomainStats | None = None, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in self.OPTIONS:
                known = ", ".join(self.OPTIONS)
                raise TypeError(f"{type(self).__name__} has no option {name!r}; expected one of {known}")
        self.stats = stats
        self.register_buffer("domain_weights", options.pop("domain_weights", None), persistent=False)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _divisor(
    inputs: LossInputs,
    options: LossOptions,
    reduction: str,
    denominator: torch.Tensor | float | None,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """[2], on the device: what the sum of the losses is divided by, and its inverse. None for no division."""
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(f"a denominator is given with reduction {reduction!r}; expected 'mean'")
        device = inputs.logits.device
        if isinstance(denominator, torch.Tensor):
            if denominator.numel() != 1:
                raise ValueError(f"the denominator has shape {list(denominator.shape)}; expected one number")
            check_device("denominator", denominator.device, device)
            number = denominator.detach().reshape(1).to(dtype)
        else:
            number = torch.full((1,), denominator, dtype=dtype, device=device)
        return torch.cat([number, number.reciprocal()])
    if reduction != "mean":
        return None
    # Inside a graph the plain operations fuse with what is around them.
    path = loss_torch if torch.compiler.is_compiling() else loss_path.path_of(inputs.logits)
    return path.valid_count(inputs.targets, inputs.logits.shape[1], options.ignore_index, dtype)


def _ids_of_rows(domain_ids: torch.Tensor | None, document_ids: torch.Tensor | None) -> torch.Tensor | None:
    """[N] or [B]: domain ids as in LossInputs. The token of an unknown document has an unknown domain, -2."""
    if domain_ids is None or document_ids is None:
        return None if domain_ids is None else domain_ids.reshape(-1).contiguous()
    known = (document_ids >= 0) & (document_ids < domain_ids.shape[-1])
    documents = document_ids.where(known, 0).long()
    found = domain_ids[documents] if domain_ids.ndim == 1 else domain_ids.gather(1, documents)
    return found.where(known, -2).reshape(-1)


def _constants(
    name: str, values: torch.Tensor | None, shape: torch.Size | None, logits: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """Numbers for each token (`shape`) or domain (None), checked, flat and of the dtype of the losses."""
    if values is None:
        return None
    check_dtype(name, values, FLOAT_DTYPES)
    check_device(name, values.device, logits.device)
    if values.ndim != 1 if shape is None else values.shape != shape:
        expected = "[D], one for each domain" if shape is None else f"{list(shape)}, that of the targets"
        raise ValueError(f"{name} have shape {list(values.shape)}; expected {expected}")
    if values.requires_grad:
        raise ValueError(f"{name} require a gradient, which the loss does not give them; pass {name}.detach()")
    return values.reshape(-1).to(dtype).contiguous()


def _check_logits(logits: torch.Tensor, targets: torch.Tensor) -> None:
    check_dtype("logits", logits, FLOAT_DTYPES)
    check_dtype("targets", targets, _INDEX_DTYPES)
    check_device("targets", targets.device, logits.device)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"logits have shape {list(logits.shape)}; expected [N, V] or [B, T, V], at least one class")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {list(targets.shape)}; expected {list(logits.shape[:-1])}, "
            f"that of the logits {list(logits.shape)} without the classes"
        )


def _check_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(_REDUCTIONS)}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is {ignore_index!r}; expected an integer")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing!r}; expected a number from 0 to 1")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss!r}; expected a number of at least 0")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap is {softcap!r}; expected a number above 0, or None")


def _check_domains(
    logits: torch.Tensor, targets: torch.Tensor, domain_ids: torch.Tensor | None, document_ids: torch.Tensor | None
) -> None:
    if domain_ids is None:
        if document_ids is not None:
            raise ValueError("document_ids are given but domain_ids is None; pass the domain of each document")
        return
    check_dtype("domain_ids", domain_ids, _INDEX_DTYPES)
    check_device("domain_ids", domain_ids.device, logits.device)
    if document_ids is None:
        if domain_ids.shape not in (targets.shape, targets.shape[:1]):
            raise ValueError(
                f"domain_ids have shape {list(domain_ids.shape)}; expected {list(targets.shape)}, that of the "
                f"targets, or {list(targets.shape[:1])}, one for each row of the batch"
            )
        return
    check_dtype("document_ids", document_ids, _INDEX_DTYPES)
    check_device("document_ids", document_ids.device, logits.device)
    if document_ids.shape != targets.shape:
        raise ValueError(f"document_ids have shape {list(document_ids.shape)}; expected {list(targets.shape)}")
    by_row = domain_ids.ndim == 2 and targets.ndim == 2 and domain_ids.shape[0] == targets.shape[0]
    if not (domain_ids.ndim == 1 or by_row) or domain_ids.shape[-1] == 0:
        raise ValueError(
            f"domain_ids have shape {list(domain_ids.shape)}; with document_ids expected [K], one for each document, "
            f"or [{targets.shape[0]}, K] for documents numbered in each row"
        )


def _check_stats(
    logits: torch.Tensor,
    domain_ids: torch.Tensor | None,
    stats: DomainStats | None,
    domain_weights: torch.Tensor | None,
    reference_losses: torch.Tensor | None,
) -> None:
    if domain_weights is not None and domain_ids is None:
        raise ValueError("domain_weights are given but domain_ids is None; pass the domain of each row or token")
    if stats is None:
        if reference_losses is not None:
            raise ValueError("reference_losses are given but stats is None; they only matter to the statistics")
        return
    if not isinstance(stats, DomainStats):
        raise TypeError(f"stats is a {type(stats).__name__}; expected a DomainStats")
    if domain_ids is None:
        raise ValueError("stats are given but domain_ids is None; pass the domain of each row or token")
    check_device("stats", stats.device, logits.device)
    if domain_weights is not None and len(domain_weights) != stats.n_domains:
        raise ValueError(f"{len(domain_weights)} domain_weights are given for {stats.n_domains} domains of stats")
    if stats.token_bytes is not None and len(stats.token_bytes) < logits.shape[-1]:
        raise ValueError(
            f"token_bytes of stats has {len(stats.token_bytes)} entries for {logits.shape[-1]} classes; "
            "give padded classes 0 bytes"
        )


def check_dtype(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if hasattr(tensor, "placements"):
        raise PlacementError(
            f"{name} are a DTensor with placements {tensor.placements}; expected a plain tensor with all classes of "
            "its rows. Pass to_local() where only the rows are spread over devices, full_tensor() where the classes are"
        )
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} are {str(tensor.dtype).removeprefix('torch.')}; expected {names}")


def check_device(name: str, found: torch.device, expected: torch.device) -> None:
    if found != expected:
        raise ValueError(f"{name} are on {found} but the logits are on {expected}; move them to one device")
