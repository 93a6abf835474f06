"""Cross-entropy of rows of logits with sums for each domain, in Triton.

One program takes one row: it reads the row once for the loss (online softmax in float32, Milakov and Gimelshein 2018),
reads it again, now mostly from the L2 cache, to write the gradient, and adds the row's statistics with integer
atomics. Nothing is read back by the host: the number of valid targets and the upstream gradient stay in device memory.
The functions have the same names and arguments as those of `mixloader.loss_torch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixloader.stats import STATISTICS, DomainStats

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every finite logit, but finite, so that a block of nothing but -inf gives 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
LOSS_SCALE = tl.constexpr(STATISTICS["loss"].scale)
LOSS_CLAMP = tl.constexpr(STATISTICS["loss"].clamp)
LOSS_SQ_SCALE = tl.constexpr(STATISTICS["loss_sq"].scale)
COLUMNS = tl.constexpr(len(STATISTICS))

MAX_BLOCK = 32768
"""Columns in a block: the most that 32 warps of sm_90 hold in registers, if loads are 128 bits wide."""
COUNT_BLOCK = 4096
RESCALE_BLOCK = 8192
RESCALE_PROGRAMS = 1024


@triton.jit
def _is_valid(target, ignore_index, V: tl.constexpr):
    return (target >= 0) & (target < V) & (target != ignore_index)


@triton.jit
def _max_and_sum(row_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of a row and the sum of exp(x - maximum), in one read."""
    cols = tl.arange(0, BLOCK)
    top = LOWEST
    total = 0.0
    for start in range(0, V, BLOCK):
        c = start + cols
        x = tl.load(row_ptr + c, mask=c < V, other=-INFINITY, eviction_policy="evict_last").to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp2((top - new_top) * LOG2E) + tl.sum(tl.exp2((x - new_top) * LOG2E), 0)
        top = new_top
    return top, total


@triton.jit
def _write_gradient(out_ptr, row_ptr, target, top, total, scale, V: tl.constexpr, BLOCK: tl.constexpr):
    """Write scale * (softmax(x) - onehot(target)). The subtraction comes before the rounding to the output's dtype."""
    cols = tl.arange(0, BLOCK)
    factor = scale / total
    for start in range(0, V, BLOCK):
        c = start + cols
        x = tl.load(row_ptr + c, mask=c < V, other=-INFINITY, eviction_policy="evict_first").to(tl.float32)
        p = tl.exp2((x - top) * LOG2E) * factor
        p = tl.where(c == target, p - scale, p)
        tl.store(out_ptr + c, p.to(out_ptr.dtype.element_ty), mask=c < V, eviction_policy="evict_first")


@triton.jit
def _write_zeros(out_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        c = start + cols
        tl.store(out_ptr + c, 0.0, mask=c < V)


@triton.jit
def _count(sums_ptr, n_domains, domain, loss, valid, ignored):
    """Add one token to its domain's sums: the arithmetic of DomainStats.add, unit for unit."""
    in_domain = (domain >= 0) & (domain < n_domains)
    good = valid & (tl.abs(loss) < INFINITY)
    counted = good & in_domain
    unknown = (domain < -1) | (domain >= n_domains)
    bad = (ignored == 0) & ((good == 0) | unknown)
    nats = tl.minimum(tl.where(counted, loss, 0.0), LOSS_CLAMP).to(tl.float64)
    units = tl.floor(nats * LOSS_SCALE + 0.5).to(tl.int64)
    units_sq = tl.floor(nats * nats * LOSS_SQ_SCALE + 0.5).to(tl.int64)
    one = tl.full((), 1, tl.int64)
    cell = sums_ptr + tl.where(in_domain, domain, n_domains) * COLUMNS
    tl.atomic_add(cell, one, mask=counted, sem="relaxed")
    tl.atomic_add(cell + 1, units, mask=counted, sem="relaxed")
    tl.atomic_add(cell + 2, units_sq, mask=counted, sem="relaxed")
    tl.atomic_add(cell + COLUMNS - 1, one, mask=bad, sem="relaxed")


@triton.jit
def _rows_kernel(
    logits_ptr,
    row_stride,
    targets_ptr,
    ignore_index,
    losses_ptr,  # float32 [N]
    softmax_ptr,  # float32 [2, N]: maximum and sum of exponentials of each row; written with LOSS, else read
    gradient_ptr,  # [N, V]
    scale_ptr,  # float32 [1] (scale_stride 0) or [N] (1)
    scale_stride,
    sums_ptr,  # int64 [D + 1, COLUMNS]
    n_domains,
    domain_ids_ptr,
    rows_per_id,
    V: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits, because row * stride passes 2^31 with 16 thousand rows of 128 thousand classes.
    row = tl.program_id(0).to(tl.int64)
    n = tl.num_programs(0)
    target = tl.load(targets_ptr + row).to(tl.int64)
    valid = _is_valid(target, ignore_index, V)
    loss = 0.0
    if valid:
        row_ptr = logits_ptr + row * row_stride
        if LOSS:
            top, total = _max_and_sum(row_ptr, V, BLOCK)
            loss = tl.log2(total) * LN2 - (tl.load(row_ptr + target).to(tl.float32) - top)
            tl.store(softmax_ptr + row, top)
            tl.store(softmax_ptr + n + row, total)
        else:
            top = tl.load(softmax_ptr + row)
            total = tl.load(softmax_ptr + n + row)
        if GRADIENT:
            scale = tl.load(scale_ptr + row * scale_stride)
            _write_gradient(gradient_ptr + row * V, row_ptr, target, top, total, scale, V, BLOCK)
    elif GRADIENT:
        _write_zeros(gradient_ptr + row * V, V, BLOCK)
    if LOSS:
        tl.store(losses_ptr + row, loss)
    if COUNT:
        domain = tl.load(domain_ids_ptr + row // rows_per_id).to(tl.int64)
        _count(sums_ptr, n_domains, domain, loss, valid, target == ignore_index)


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


@triton.jit
def _rescale_kernel(x_ptr, n_blocks, n, factor_ptr, BLOCK: tl.constexpr):
    """x *= factor in place. The device looks at the factor: if it is 1, every program returns at once."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        # A 64-bit start makes `block` and with it the offsets 64 bits wide.
        for block in range(tl.program_id(0).to(tl.int64), n_blocks, tl.num_programs(0)):
            offsets = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < n).to(tl.float32)
            tl.store(x_ptr + offsets, (x * factor).to(x_ptr.dtype.element_ty), mask=offsets < n)


# Triton 3.10 changes the default of this option; pinned, so that losses do not change with the compiler.
FUSION = {"enable_fp_fusion": True}


def launch_options(n_classes: int, row_stride: int) -> dict[str, int]:
    """Block size and compiler options of `_rows_kernel`."""
    # Rows that do not start at multiples of 16 elements are loaded one element at a time, which takes more registers.
    aligned = n_classes % 16 == 0 and row_stride % 16 == 0
    block = min(MAX_BLOCK if aligned else MAX_BLOCK // 4, triton.next_power_of_2(n_classes))
    num_warps = min(32, max(4, block // (1024 if aligned else 256)))
    return {"BLOCK": block, "num_warps": num_warps, **FUSION}


def valid_count(targets: torch.Tensor, n_classes: int, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    """Number n of valid targets, and 1 / max(n, 1): float32 [2], for the mean."""
    out = torch.empty(2, dtype=dtype, device=targets.device)
    with torch.cuda.device_of(targets):
        _valid_count_kernel[(1,)](
            targets, len(targets), ignore_index, out, V=n_classes, BLOCK=COUNT_BLOCK, num_warps=16, **FUSION
        )
    return out


def forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    stats: DomainStats | None,
    domain_ids: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Token losses, and what `backward` needs besides its other arguments, and a gradient if there is a `scale`.

    logits [N, V], float32, bfloat16 or float16, of any strides; targets [N]; domain_ids [B], each for N / B
    consecutive rows, read if there are `stats`. scale float32 [1]: the gradient is that of scale * sum(losses), in the
    dtype of the logits. Rows that are not valid have loss 0 and gradient 0. Losses are float32.
    """
    n, n_classes = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    softmax = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    gradient = None if scale is None else torch.empty(n, n_classes, dtype=logits.dtype, device=logits.device)
    _rows(logits, targets, ignore_index, losses, softmax, gradient, scale, stats, domain_ids)
    return losses, (softmax,), gradient


def backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    saved: tuple[torch.Tensor, ...],
    scale: torch.Tensor,
) -> torch.Tensor:
    """Gradient [N, V], in the dtype of the logits, of sum(scale * losses); scale float32 [1] or [N]."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _rows(logits, targets, ignore_index, None, saved[0], gradient, scale, None, None)
    return gradient


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient * factor, rounded once, in place; factor is a scalar float32 tensor."""
    n = gradient.numel()
    n_blocks = triton.cdiv(n, RESCALE_BLOCK)
    with torch.cuda.device_of(gradient):
        _rescale_kernel[(min(n_blocks, RESCALE_PROGRAMS),)](
            gradient, n_blocks, n, factor, BLOCK=RESCALE_BLOCK, num_warps=16, **FUSION
        )
    return gradient


def _rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    losses: torch.Tensor | None,
    softmax: torch.Tensor,
    gradient: torch.Tensor | None,
    scale: torch.Tensor | None,
    stats: DomainStats | None,
    domain_ids: torch.Tensor | None,
) -> None:
    n, n_classes = logits.shape
    if n == 0:
        return
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    with torch.cuda.device_of(logits):
        _rows_kernel[(n,)](
            logits,
            logits.stride(0),
            targets,
            ignore_index,
            losses,
            softmax,
            gradient,
            scale,
            0 if scale is None or len(scale) == 1 else 1,
            None if stats is None else stats.buffer,
            0 if stats is None else stats.n_domains,
            domain_ids,
            1 if domain_ids is None else n // len(domain_ids),
            V=n_classes,
            LOSS=losses is not None,
            GRADIENT=gradient is not None,
            COUNT=stats is not None,
            **launch_options(n_classes, logits.stride(0)),
        )
