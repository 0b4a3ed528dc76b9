"""Causal attention for CPUs: blocks of queries against the keys up to them, a few heads at a time, in plain batched products.

Exact softmax over whole rows (no running maximum), recomputed in the backward pass, so what is kept is linear in the length.
It is for bfloat16, where torch's flash kernel for CPUs is slow: forward and backward of 8 sequences of 256 tokens with 4 heads of
64 take 21 ms instead of 34 on one core; in float32 torch's is the faster one, 28 ms to 33 (docs/log.md).

Letters: B sequences, S tokens, G key-value heads, H query heads, J = H / G query heads that share one, C query and key dimensions,
V value dimensions, N = B * G, Q queries of one block, P keys that a block may see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries
SCORE_BYTES = 1 << 21  # of the scores that are in work at once
aten = torch.ops.aten


def attend(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor) -> Tensor:
    """softmax(q k / sqrt(C)) v with each token seeing itself and what came before; [B, H, S, V].

    Consecutive query heads share a key-value head. Differentiable once.
    """
    n_kv_heads = k_BGSC.shape[1]
    q_NJSC = q_BHSC.unflatten(1, (n_kv_heads, -1)).flatten(0, 1)
    y_NJSV: Tensor = _Attention.apply(q_NJSC, k_BGSC.flatten(0, 1), v_BGSV.flatten(0, 1))
    return y_NJSV.unflatten(0, (-1, n_kv_heads)).flatten(1, 2)


def _blocks(q_NJSC: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """(heads, queries, keys that the last query sees) of each piece of work."""
    n_heads, n_sharing, length, _ = q_NJSC.shape
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        step = max(1, SCORE_BYTES // (n_sharing * (stop - start) * stop * q_NJSC.element_size()))
        for head in range(0, n_heads, step):
            yield slice(head, head + step), slice(start, stop), stop


def _probabilities(q_NMC: Tensor, k_NPC: Tensor, mask_QQ: Tensor) -> Tensor:
    """Softmaxed scores [N, M, P] of M = J * Q rows: row j * Q + i is query i of the block, which ends at the last key."""
    n_queries = len(mask_QQ)
    score_NMP = torch.bmm(q_NMC, k_NPC.transpose(1, 2))
    score_NMP[:, :, -n_queries:].unflatten(1, (-1, n_queries)).add_(mask_QQ)
    return torch.softmax(score_NMP, -1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NJSC: Tensor, k_NSC: Tensor, v_NSV: Tensor) -> Tensor:
        q_NJSC = q_NJSC * q_NJSC.shape[-1] ** -0.5
        mask_QQ = _mask(q_NJSC)
        y_NJSV = q_NJSC.new_empty(*q_NJSC.shape[:3], v_NSV.shape[2])
        for heads, queries, n_keys in _blocks(q_NJSC):
            q_NMC = q_NJSC[heads, :, queries].flatten(1, 2)
            n_queries = queries.stop - queries.start
            prob_NMP = _probabilities(q_NMC, k_NSC[heads, :n_keys], mask_QQ[:n_queries, :n_queries])
            y_NJSV[heads, :, queries] = torch.bmm(prob_NMP, v_NSV[heads, :n_keys]).unflatten(1, (-1, n_queries))
        ctx.save_for_backward(q_NJSC, k_NSC, v_NSV)
        return y_NJSV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NJSV: Tensor) -> tuple[Tensor, ...]:
        q_NJSC, k_NSC, v_NSV = ctx.saved_tensors
        mask_QQ = _mask(q_NJSC)
        dq_NJSC, dk_NSC, dv_NSV = torch.empty_like(q_NJSC), torch.zeros_like(k_NSC), torch.zeros_like(v_NSV)
        for heads, queries, n_keys in _blocks(q_NJSC):
            q_NMC, dy_NMV = q_NJSC[heads, :, queries].flatten(1, 2), dy_NJSV[heads, :, queries].flatten(1, 2)
            n_queries = queries.stop - queries.start
            k_NPC, v_NPV = k_NSC[heads, :n_keys], v_NSV[heads, :n_keys]
            prob_NMP = _probabilities(q_NMC, k_NPC, mask_QQ[:n_queries, :n_queries])
            dscore_NMP = aten._softmax_backward_data(torch.bmm(dy_NMV, v_NPV.transpose(1, 2)), prob_NMP, -1, prob_NMP.dtype)
            dv_NSV[heads, :n_keys] += torch.bmm(prob_NMP.transpose(1, 2), dy_NMV)
            dk_NSC[heads, :n_keys] += torch.bmm(dscore_NMP.transpose(1, 2), q_NMC)
            dq_NJSC[heads, :, queries] = torch.bmm(dscore_NMP, k_NPC).unflatten(1, (-1, n_queries))
        return dq_NJSC.mul_(q_NJSC.shape[-1] ** -0.5), dk_NSC, dv_NSV


def _mask(q_NJSC: Tensor) -> Tensor:
    """0 on and below the diagonal, -inf above."""
    size = min(BLOCK, q_NJSC.shape[2])
    return torch.full((size, size), float("-inf"), dtype=q_NJSC.dtype, device=q_NJSC.device).triu_(1)
