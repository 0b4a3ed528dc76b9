"""float32 rounded to the 10 bits of tf32, ties away from zero: matrix units cut the rest off, which makes sums of products too small.

The copy engine rounds what it loads (`descriptor.py`). What is loaded by pointers is rounded on its way, but for rows that are gathered: every
token is gathered K times, and a load that is computed with is not copied asynchronously in all of the kernels. They are rounded once, before.
"""

# ruff: noqa: RET505 - Triton compiles only the branch of a constant condition, and only if it is written as one
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def nearest(x, PRECISION: tl.constexpr):
    """`x` as the products in PRECISION take it: float32 for "tf32" rounded, all else as it is. NaN stays NaN."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def _round(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, nearest(tl.load(x + at, mask=at < n, other=0.0), "tf32"), mask=at < n)


def rounded(x: Tensor, precision: str) -> Tensor:
    """`nearest` of a whole tensor, contiguous; `x` itself where there is nothing to round."""
    if precision != "tf32" or x.dtype != torch.float32 or x.numel() == 0:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    _round[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024, num_warps=4)
    return out
