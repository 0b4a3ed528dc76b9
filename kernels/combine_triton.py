"""Sum of a token's rows, each times its gate, in Triton: the last step of a MoE layer. No atomics, so it is deterministic.

Letters: T tokens, K experts chosen per token, R rows sorted by expert, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _combine(y, row, gate, end, out, width, stride_y, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    fits = column < width
    kept = tl.load(end)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(K):
        at = tl.load(row + token * K + k)
        weight = tl.load(gate + token * K + k).to(tl.float32)
        part = tl.load(y + at * stride_y + column, mask=fits & (at < kept), other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out + token.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=fits)


def combine(y_RD: Tensor, row_TK: Tensor, gate_TK: Tensor, kept: Tensor) -> Tensor:
    """out_t = sum_k gate_tk * y[row_tk], added in float32 in the order of k; [T, D].

    `kept` (int32, on the device) is the number of rows that hold a result: an assignment whose row lies beyond it was dropped and
    adds nothing, whatever the memory there holds.
    """
    n_tokens, top_k = row_TK.shape
    width = y_RD.shape[1]
    out = torch.empty(n_tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    block = min(1024, triton.next_power_of_2(width))
    _combine[(n_tokens, triton.cdiv(width, block))](y_RD, row_TK, gate_TK.contiguous(), kept, out, width, y_RD.stride(0), K=top_k, BLOCK=block)
    return out
