"""A row of logits as one program of a Triton kernel reads and writes it: its sums in one read, its gradient in another.

A row is cut into a body, which starts and ends at multiples of 16 bytes, and the few classes before and after it (the
edges, none in most models). Loads and stores of the body are 128 bits wide whatever the number of classes.

Where rows are not whole multiples of 16 bytes, the cut and with it the order of the additions depends on where a row
stands, so its loss may differ in the last bits from that of the same row elsewhere. In all others it does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every finite logit, but finite, so that a block of nothing but -inf gives 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
# exp of this is 0 in float32, and 0 times this is 0.
VANISHING = tl.constexpr(-200.0)


@triton.jit
def capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap), from one exponential."""
    if SOFTCAP:
        e = tl.exp2(tl.abs(x) * (-2.8853900817779268 / softcap))  # exp(-2 |x| / softcap)
        x = tl.where(x < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))
    return x


@triton.jit
def _cut(offset, V: tl.constexpr, WIDTH: tl.constexpr, PEEL: tl.constexpr):
    """Where the body of a row begins: its element in memory, and its class; and how many classes it has.

    offset: the row's first element. WIDTH: elements in 16 bytes.
    """
    if PEEL:
        start = (offset + WIDTH - 1) // WIDTH * WIDTH
        head = (start - offset).to(tl.int32)
        body = tl.maximum(V - head, 0) // WIDTH * WIDTH
    else:
        start = offset
        head = 0
        body = V
    return start, head, body


@triton.jit
def _edge_classes(head, body, WIDTH: tl.constexpr):
    """The classes before and after the body; those that are not below V are none."""
    i = tl.arange(0, 2 * WIDTH)
    return tl.where(i < head, i, i + body)


@triton.jit
def _take(x, inside, seen, top, total, first, second, spread, DISTRIBUTION: tl.constexpr, SMOOTHING: tl.constexpr):
    """Take more logits x into the running sums of a row; `seen`: how many classes were taken before.

    top: maximum. Over the classes c with d = x[c] - top: total = sum(exp(d)), first = sum(d * exp(d)),
    second = sum(exp(2 * d)), spread = sum(d). x is -inf where not `inside`.
    """
    new_top = tl.maximum(top, tl.max(x, 0))
    e = tl.exp2((x - new_top) * LOG2E)
    shift = tl.maximum(top - new_top, VANISHING)
    decay = tl.exp2(shift * LOG2E)
    if DISTRIBUTION:
        first = decay * (first + shift * total) + tl.sum(e * tl.maximum(x - new_top, VANISHING), 0)
        second = decay * decay * second + tl.sum(e * e, 0)
    if SMOOTHING:
        moved = tl.where(seen > 0, (top - new_top) * seen, 0.0)
        spread = spread + moved + tl.sum(tl.where(inside, x - new_top, 0.0), 0)
    total = total * decay + tl.sum(e, 0)
    return new_top, total, first, second, spread


@triton.jit
def sums_of_row(
    logits_ptr,
    offset,
    softcap,
    V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PEEL: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of `_take` over a row, in one read."""
    start, head, body = _cut(offset, V, WIDTH, PEEL)
    top = LOWEST
    total = 0.0
    first = 0.0
    second = 0.0
    spread = 0.0
    seen = 0
    if PEEL:
        c = _edge_classes(head, body, WIDTH)
        edges = tl.load(logits_ptr + offset + c, mask=c < V, other=-INFINITY).to(tl.float32)
        edges = tl.where(c < V, capped(edges, softcap, SOFTCAP), -INFINITY)
        top, total, first, second, spread = _take(
            edges, c < V, 0, top, total, first, second, spread, DISTRIBUTION, SMOOTHING
        )
        seen = V - body
    cols = tl.arange(0, BLOCK)
    for block in range(0, V, BLOCK):
        i = block + cols
        x = tl.load(logits_ptr + start + i, mask=i < body, other=-INFINITY, eviction_policy="evict_last")
        x = capped(x.to(tl.float32), softcap, SOFTCAP)
        if SOFTCAP:
            x = tl.where(i < body, x, -INFINITY)
        top, total, first, second, spread = _take(
            x, i < body, seen + block, top, total, first, second, spread, DISTRIBUTION, SMOOTHING
        )
    return top, total, first, second, spread


@triton.jit
def _gradient_of(x, hit, top, of_p, at_target, everywhere, softcap, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr):
    """of_p * exp(x - top), minus at_target where `hit` and minus `everywhere`. The subtraction comes before the
    rounding to the output's dtype."""
    slope = 1.0
    if SOFTCAP:
        e = tl.exp2(tl.abs(x) * (-2.8853900817779268 / softcap))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, without its cancellation
        x = tl.where(x < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))
    g = tl.exp2((x - top) * LOG2E) * of_p
    g = tl.where(hit, g - at_target, g)
    if SMOOTHING:
        g = g - everywhere
    if SOFTCAP:
        g = g * slope
    return g


@triton.jit
def write_gradient(
    out_ptr,
    out_offset,
    logits_ptr,
    offset,
    target,
    top,
    of_p,
    at_target,
    everywhere,
    softcap,
    V: tl.constexpr,
    ZERO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PEEL: tl.constexpr,
    SAME_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of a row, or zeros, without reading the row."""
    start, head, body = _cut(offset, V, WIDTH, PEEL)
    out_start = out_offset + head
    if SAME_STRIDE:
        out_start = start  # which the compiler knows to be aligned
    if PEEL:
        c = _edge_classes(head, body, WIDTH)
        edges = tl.zeros((2 * WIDTH,), tl.float32)
        if not ZERO:
            edges = tl.load(logits_ptr + offset + c, mask=c < V, other=-INFINITY).to(tl.float32)
            edges = _gradient_of(edges, c == target, top, of_p, at_target, everywhere, softcap, SOFTCAP, SMOOTHING)
        tl.store(out_ptr + out_offset + c, edges.to(out_ptr.dtype.element_ty), mask=c < V)
    cols = tl.arange(0, BLOCK)
    for block in range(0, V, BLOCK):
        i = block + cols
        g = tl.zeros((BLOCK,), tl.float32)
        if not ZERO:
            x = tl.load(logits_ptr + start + i, mask=i < body, other=-INFINITY, eviction_policy="evict_first")
            hit = i == target - head
            g = _gradient_of(x.to(tl.float32), hit, top, of_p, at_target, everywhere, softcap, SOFTCAP, SMOOTHING)
        g = g.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_start + i, g, mask=i < body, eviction_policy="evict_first")
