"""A tensor times a factor that only the device knows, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192
PROGRAMS = 1024
# The default of fusion changes with Triton 3.10; pinned as in cross_entropy.py, so that nobody is warned.
OPTIONS = {"num_warps": 16, "enable_fp_fusion": True}


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


def rescale(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient * factor, rounded once, in place; factor is a scalar float32 tensor.

    gradient: [N, V], rows contiguous; padding between the rows is multiplied, too.
    """
    n, n_classes = gradient.shape
    elements = (n - 1) * gradient.stride(0) + n_classes
    if n == 0:
        return gradient
    n_blocks = triton.cdiv(elements, BLOCK)
    with torch.cuda.device_of(gradient):
        _rescale_kernel[(min(n_blocks, PROGRAMS),)](gradient, n_blocks, elements, factor, BLOCK=BLOCK, **OPTIONS)
    return gradient
