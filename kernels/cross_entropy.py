"""Cross-entropy of rows of logits with sums for each domain, in Triton.

One program takes one row: it reads the row once for the loss (online softmax in float32, Milakov and Gimelshein 2018),
reads it again, now mostly from the L2 cache, to write the gradient, and adds the row's statistics with integer
atomics. Nothing is read back by the host: the number of valid targets and the upstream gradient stay in device memory.
This is a path of the loss, see `mixloader.loss_path.LossPath`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixloader.kernels.rescale import rescale
from mixloader.kernels.row import INFINITY, LN2, LOG2E, capped, sums_of_row, write_gradient
from mixloader.loss_path import LossInputs, LossOptions, empty_gradient
from mixloader.stats import STATISTICS

__all__ = ["SAVED", "backward", "forward", "rescale", "valid_count"]

SAVED = 2  # maximum and sum of exponentials

COLUMNS = tl.constexpr(len(STATISTICS))
NATS_SCALE = tl.constexpr(STATISTICS["loss"].scale)  # of the loss, the excess and the entropy alike
NATS_CLAMP = tl.constexpr(STATISTICS["loss"].clamp)
LOSS_SQ_SCALE = tl.constexpr(STATISTICS["loss_sq"].scale)
EL2N_SCALE = tl.constexpr(STATISTICS["el2n"].scale)
EL2N_CLAMP = tl.constexpr(STATISTICS["el2n"].clamp)
BYTES_CLAMP = tl.constexpr(int(STATISTICS["bytes"].clamp))
EXCESS, ENTROPY, CORRECT, EL2N, BYTES, BAD = (
    tl.constexpr(list(STATISTICS).index(name)) for name in ("excess", "entropy", "correct", "el2n", "bytes", "bad")
)

MAX_BLOCK = 32768
"""Columns in a block: the most that 32 warps of sm_90 hold in registers."""
COUNT_BLOCK = 4096
# Triton 3.10 changes the default of this option; pinned, so that losses do not change with the compiler.
FUSION = {"enable_fp_fusion": True}


@triton.jit
def _is_valid(target, ignore_index, V: tl.constexpr):
    return (target >= 0) & (target < V) & (target != ignore_index)


@triton.jit
def _units(value, scale, clamp):
    """Fixed point: the arithmetic of stats.add_tokens. `value` is float64."""
    return tl.floor(tl.minimum(tl.maximum(value, 0.0), clamp) * scale + 0.5).to(tl.int64)


@triton.jit
def _count(
    sums_ptr,
    n_domains,
    domain,
    valid,
    ignored,
    loss,  # as returned
    nll,
    entropy,
    correct,
    el2n,
    row,
    target,
    reference_losses_ptr,
    token_bytes_ptr,
    DISTRIBUTION: tl.constexpr,
):
    """Add one token to its domain's sums: the arithmetic of stats.add_tokens, unit for unit."""
    in_domain = (domain >= 0) & (domain < n_domains)
    good = valid & (tl.abs(nll) < INFINITY) & (tl.abs(loss) < INFINITY)
    if reference_losses_ptr is not None:
        reference = tl.load(reference_losses_ptr + row)
        good = good & (tl.abs(reference) < INFINITY)
    counted = good & in_domain
    bad = (ignored == 0) & ((good == 0) | (domain < -1) | (domain >= n_domains))
    one = tl.full((), 1, tl.int64)
    cell = sums_ptr + tl.where(in_domain, domain, n_domains) * COLUMNS
    nats = tl.minimum(tl.where(counted, nll, 0.0), NATS_CLAMP).to(tl.float64)
    tl.atomic_add(cell, one, mask=counted, sem="relaxed")
    tl.atomic_add(cell + 1, _units(nats, NATS_SCALE, NATS_CLAMP), mask=counted, sem="relaxed")
    units = _units(nats * nats, LOSS_SQ_SCALE, NATS_CLAMP * NATS_CLAMP)
    tl.atomic_add(cell + 2, units, mask=counted, sem="relaxed")
    if reference_losses_ptr is not None:
        excess = tl.where(counted, nll, 0.0).to(tl.float64) - tl.where(counted, reference, 0.0).to(tl.float64)
        tl.atomic_add(cell + EXCESS, _units(excess, NATS_SCALE, NATS_CLAMP), mask=counted, sem="relaxed")
    if DISTRIBUTION:
        entropy = tl.where(counted, entropy, 0.0).to(tl.float64)
        el2n = tl.where(counted, el2n, 0.0).to(tl.float64)
        tl.atomic_add(cell + ENTROPY, _units(entropy, NATS_SCALE, NATS_CLAMP), mask=counted, sem="relaxed")
        tl.atomic_add(cell + CORRECT, one, mask=counted & correct, sem="relaxed")
        tl.atomic_add(cell + EL2N, _units(el2n, EL2N_SCALE, EL2N_CLAMP), mask=counted, sem="relaxed")
    if token_bytes_ptr is not None:
        n_bytes = tl.load(token_bytes_ptr + target, mask=counted, other=0)
        tl.atomic_add(cell + BYTES, tl.minimum(n_bytes, BYTES_CLAMP).to(tl.int64), mask=counted, sem="relaxed")
    tl.atomic_add(cell + BAD, one, mask=bad, sem="relaxed")


@triton.jit
def _rows_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    domain_ids_ptr,
    rows_per_id,
    token_weights_ptr,  # float32 [N] or None
    domain_weights_ptr,  # float32 [n_weights] or None
    n_weights,
    reference_losses_ptr,  # float32 [N] or None
    token_bytes_ptr,  # int32 [V] or None
    losses_ptr,  # float32 [N]
    saved_ptr,  # float32 [2, N]: maximum and sum of exponentials of each row; written with LOSS, else read
    gradient_ptr,  # [N, V]
    gradient_stride,
    scale_ptr,  # float32 [1] (scale_stride 0) or [N] (1)
    scale_stride,
    sums_ptr,  # int64 [D + 1, COLUMNS]
    n_domains,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    V: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PEEL: tl.constexpr,
    SAME_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits, because row * stride passes 2^31 with 16 thousand rows of 128 thousand classes.
    row = tl.program_id(0).to(tl.int64)
    n = tl.num_programs(0)
    offset = row * row_stride
    out_offset = row * gradient_stride
    target = tl.load(targets_ptr + row).to(tl.int64)
    valid = _is_valid(target, ignore_index, V)
    domain = tl.full((), -1, tl.int64)
    if domain_ids_ptr is not None:
        domain = tl.load(domain_ids_ptr + row // rows_per_id).to(tl.int64)
    loss = 0.0
    nll = 0.0
    entropy = 0.0
    el2n = 0.0
    correct = False
    if valid:
        weight = 1.0
        if token_weights_ptr is not None:
            weight = tl.load(token_weights_ptr + row)
        if domain_weights_ptr is not None:
            known = (domain >= 0) & (domain < n_weights)
            weight = weight * tl.load(domain_weights_ptr + domain, mask=known, other=1.0)
        if LOSS:
            # Before anything is written, which may be over the logits.
            x_target = capped(tl.load(logits_ptr + offset + target).to(tl.float32), softcap, SOFTCAP)
            top, total, first, second, spread = sums_of_row(
                logits_ptr, offset, softcap, V, SOFTCAP, DISTRIBUTION, SMOOTHING, PEEL, WIDTH, BLOCK
            )
            tl.store(saved_ptr + row, top)
            tl.store(saved_ptr + n + row, total)
            log_total = tl.log2(total) * LN2
            nll = log_total - (x_target - top)
            loss = nll
            if SMOOTHING:
                loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_total - spread / V)
            if Z_LOSS:
                loss = loss + z_loss * (top + log_total) * (top + log_total)
            loss = loss * weight
            if DISTRIBUTION:
                p = tl.exp2((x_target - top) * LOG2E) / total
                missing = (1.0 - p) * (1.0 - p)
                entropy = log_total - first / total
                # The other classes' squares: of a sum of 1 - p they are no more than its square, whatever was rounded.
                others = tl.minimum(tl.maximum(second / (total * total) - p * p, 0.0), missing)
                el2n = tl.sqrt(missing + others)
                correct = x_target >= top
        else:
            top = tl.load(saved_ptr + row)
            total = tl.load(saved_ptr + n + row)
        if GRADIENT:
            scale = tl.load(scale_ptr + row * scale_stride) * weight
            of_p = scale / total
            if Z_LOSS:
                of_p = of_p * (1.0 + 2.0 * z_loss * (top + tl.log2(total) * LN2))
            at_target = scale
            everywhere = 0.0
            if SMOOTHING:
                at_target = scale * (1.0 - label_smoothing)
                everywhere = scale * label_smoothing / V
            write_gradient(
                gradient_ptr, out_offset, logits_ptr, offset, target, top, of_p, at_target, everywhere, softcap,
                V, False, SOFTCAP, SMOOTHING, PEEL, SAME_STRIDE, WIDTH, BLOCK,
            )  # fmt: skip
    elif GRADIENT:
        write_gradient(
            gradient_ptr, out_offset, logits_ptr, offset, target, 0.0, 0.0, 0.0, 0.0, softcap,
            V, True, SOFTCAP, SMOOTHING, PEEL, SAME_STRIDE, WIDTH, BLOCK,
        )  # fmt: skip
    if LOSS:
        tl.store(losses_ptr + row, loss)
    if COUNT:
        _count(
            sums_ptr, n_domains, domain, valid, target == ignore_index, loss, nll, entropy, correct, el2n, row, target,
            reference_losses_ptr, token_bytes_ptr, DISTRIBUTION,
        )  # fmt: skip


@triton.jit
def _valid_count_kernel(targets_ptr, n, ignore_index, out_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the number of valid targets, and its inverse (of 1 if there are none), as float32 [2]."""
    offsets = tl.arange(0, BLOCK)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        target = tl.load(targets_ptr + start + offsets, mask=start + offsets < n, other=-1).to(tl.int64)
        counts += _is_valid(target, ignore_index, V).to(tl.int32)
    count = tl.sum(counts, 0)
    tl.store(out_ptr, count.to(tl.float32))
    tl.store(out_ptr + 1, 1.0 / tl.maximum(count, 1).to(tl.float32))


def launch_options(n_classes: int, row_stride: int, element_size: int, softcap: bool) -> dict[str, int | bool]:
    """Block size and compiler options of `_rows_kernel`."""
    width = 16 // element_size
    # The chain rule through tanh keeps two more numbers of each logit, so that a thread can take half as many.
    most, of_warp = (MAX_BLOCK // 2, 512) if softcap else (MAX_BLOCK, 1024)
    block = min(most, triton.next_power_of_2(n_classes))
    return {
        # Triton knows of a number whether it is a multiple of 16, and nothing finer.
        "PEEL": n_classes % width != 0 or row_stride % 16 != 0,
        "WIDTH": width,
        "BLOCK": block,
        "num_warps": min(32, max(4, block // of_warp)),
        **FUSION,
    }


def valid_count(targets: torch.Tensor, n_classes: int, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(2, dtype=dtype, device=targets.device)
    with torch.cuda.device_of(targets):
        _valid_count_kernel[(1,)](
            targets, len(targets), ignore_index, out, V=n_classes, BLOCK=COUNT_BLOCK, num_warps=16, **FUSION
        )
    return out


def forward(
    inputs: LossInputs,
    options: LossOptions,
    sums: torch.Tensor | None,
    scale: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    logits, n = inputs.logits, len(inputs.targets)
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    saved = torch.empty(SAVED, n, dtype=torch.float32, device=logits.device)
    gradient = None if scale is None else empty_gradient(logits) if out is None else out
    _rows(inputs, options, losses, saved, gradient, scale, sums)
    return losses, saved, gradient


def backward(
    inputs: LossInputs,
    options: LossOptions,
    saved: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    gradient = empty_gradient(inputs.logits) if out is None else out
    _rows(inputs, options, None, saved, gradient, scale, None)
    return gradient


def _rows(
    inputs: LossInputs,
    options: LossOptions,
    losses: torch.Tensor | None,
    saved: torch.Tensor,
    gradient: torch.Tensor | None,
    scale: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    logits = inputs.logits
    n, n_classes = logits.shape
    if n == 0:
        return
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    stride = logits.stride(0)
    out_stride = stride if gradient is None else gradient.stride(0)
    counted = sums is not None
    # A missing tensor is None, and what nobody reads is the same at every launch, so that it is compiled once.
    with torch.cuda.device_of(logits):
        _rows_kernel[(n,)](
            logits,
            stride,
            inputs.targets,
            inputs.domain_ids if counted or inputs.domain_weights is not None else None,
            inputs.rows_per_id,
            inputs.token_weights,
            inputs.domain_weights,
            0 if inputs.domain_weights is None else len(inputs.domain_weights),
            inputs.reference_losses if counted else None,
            inputs.token_bytes if counted else None,
            losses,
            saved,
            gradient,
            out_stride,
            scale,
            0 if scale is None or len(scale) == 1 else 1,
            sums,
            0 if sums is None else len(sums) - 1,
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.softcap,
            V=n_classes,
            LOSS=losses is not None,
            GRADIENT=gradient is not None,
            COUNT=counted,
            DISTRIBUTION=counted and options.distribution,
            SMOOTHING=options.label_smoothing > 0,
            Z_LOSS=options.z_loss > 0,
            SOFTCAP=options.softcap > 0,
            SAME_STRIDE=out_stride == stride,
            **launch_options(n_classes, stride, logits.element_size(), options.softcap > 0),
        )
