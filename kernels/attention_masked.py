"""Attention of which each query sees a part of the past: windows, chunks, documents, sinks, and keys from before the queries.

Blocks of queries against the keys that any of them sees, so that a window costs its width and not the length. Softmax over whole rows
in float32 at least, made again in the backward pass: what is kept is linear in the length. Plain causal attention has faster kernels;
see `dispatch.attend`.

Letters: B sequences, S queries, P keys of which the last S are the queries' own, G key-value heads, H query heads, J = H / G query
heads that share one, C query and key dimensions, V value dimensions, N = B * G, Q queries of one block, K keys of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries
SCORE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}  # of the scores that are in work at once


@dataclass(frozen=True)
class Sight:
    """What queries at positions `start`, `start` + 1, ... see of the keys up to their own position."""

    start: int = 0
    window: int | None = None  # the last so many, themselves included
    chunk: int | None = None  # those in their own one of the consecutive blocks of so many positions
    document_BP: Tensor | None = None  # those whose number is their own; int64, of the keys that are given

    def is_causal(self, n_queries: int, n_keys: int) -> bool:
        """Whether this is nothing but causal attention of `n_queries` tokens among themselves."""
        unlimited = all(limit is None or limit >= n_queries for limit in (self.window, self.chunk))
        return self.start == 0 and n_queries == n_keys and unlimited and self.document_BP is None

    def lowest(self, position: int) -> int:
        """Position of the first key that the query at `position` may see."""
        lowest = 0 if self.window is None else max(0, position - self.window + 1)
        return lowest if self.chunk is None else max(lowest, position // self.chunk * self.chunk)


def attend(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPV: Tensor, sight: Sight, sink_H: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k) v over the keys in sight, [B, H, S, V]; scale is 1 / sqrt(C) unless it is given.

    With `sink_H` the softmax has one more term, e to the head's sink, that carries no value (gpt-oss; Xiao 2023). Consecutive query
    heads share a key-value head. One dtype for q, k and v. Differentiable once, in q, k, v and the sinks.
    """
    n_kv_heads = k_BGPC.shape[1]
    q_NJSC = q_BHSC.unflatten(1, (n_kv_heads, -1)).flatten(0, 1)
    scale = q_BHSC.shape[-1] ** -0.5 if scale is None else scale
    y_NJSV: Tensor = _Attention.apply(q_NJSC, k_BGPC.flatten(0, 1), v_BGPV.flatten(0, 1), sink_H, sight, scale)
    return y_NJSV.unflatten(0, (-1, n_kv_heads)).flatten(1, 2)


@dataclass(frozen=True)
class _Work:
    """Heads, queries and keys of one piece of work, and which keys each query does not see."""

    heads: slice
    queries: slice
    keys: slice
    hidden: Tensor | None  # bool, broadcasts to [N, J, Q, K]


def _pieces(q_NJSC: Tensor, k_NPC: Tensor, sight: Sight) -> Iterator[_Work]:
    n_rows, n_sharing, n_queries, _ = q_NJSC.shape
    before = sight.start + n_queries - k_NPC.shape[1]  # position of the first key
    for start in range(0, n_queries, BLOCK):
        stop = min(start + BLOCK, n_queries)
        low, high = max(before, sight.lowest(sight.start + start)), sight.start + stop
        hidden = _hidden(sight, sight.start + start, high, low, before, n_rows, q_NJSC.device)
        step = max(1, SCORE_BYTES.get(q_NJSC.device.type, 1 << 21) // (4 * n_sharing * (stop - start) * (high - low)))
        for row in range(0, n_rows, step):
            rows = slice(row, row + step)
            part = hidden if hidden is None or len(hidden) == 1 else hidden[rows]
            yield _Work(rows, slice(start, stop), slice(low - before, high - before), part)


def _hidden(sight: Sight, first: int, stop: int, low: int, before: int, n_rows: int, device: torch.device) -> Tensor | None:
    """Which keys at positions low .. stop - 1 the queries at first .. stop - 1 do not see: [N or 1, 1, Q, K]; None for none."""
    hidden_NQK = None
    if stop - first > 1:
        query_Q1, key_K = torch.arange(first, stop, device=device)[:, None], torch.arange(low, stop, device=device)
        hidden_QK = key_K > query_Q1
        if sight.window is not None:
            hidden_QK |= key_K <= query_Q1 - sight.window
        if sight.chunk is not None:
            hidden_QK |= key_K // sight.chunk != query_Q1 // sight.chunk
        hidden_NQK = hidden_QK[None]
    if sight.document_BP is not None:
        document_NP = sight.document_BP.repeat_interleave(n_rows // len(sight.document_BP), 0)
        other_NQK = document_NP[:, first - before : stop - before, None] != document_NP[:, None, low - before : stop - before]
        hidden_NQK = other_NQK if hidden_NQK is None else other_NQK | hidden_NQK
    return None if hidden_NQK is None else hidden_NQK[:, None]


def _probabilities(q_NJQC: Tensor, k_NKC: Tensor, sink_NJ11: Tensor | None, work: _Work, scale: float) -> tuple[Tensor, Tensor | None]:
    """Softmaxed scores [N, J, Q, K] in float32 at least, and the sinks' share [N, J, Q, 1]."""
    score_NJQK = torch.bmm(q_NJQC.flatten(1, 2), k_NKC.transpose(1, 2)).view(*q_NJQC.shape[:3], -1)
    score_NJQK = score_NJQK.to(torch.promote_types(score_NJQK.dtype, torch.float32)).mul_(scale)
    if work.hidden is not None:
        score_NJQK.masked_fill_(work.hidden, float("-inf"))
    if sink_NJ11 is None:
        return torch.softmax(score_NJQK, -1), None
    sink_NJ11 = sink_NJ11[work.heads].to(score_NJQK.dtype)
    most_NJQ1 = torch.maximum(score_NJQK.amax(-1, keepdim=True), sink_NJ11)
    weight_NJQK, aside_NJQ1 = score_NJQK.sub_(most_NJQ1).exp_(), (sink_NJ11 - most_NJQ1).exp_()
    total_NJQ1 = weight_NJQK.sum(-1, keepdim=True).add_(aside_NJQ1)
    return weight_NJQK.div_(total_NJQ1), aside_NJQ1.div_(total_NJQ1)


def _by_row(sink_H: Tensor | None, q_NJSC: Tensor) -> Tensor | None:
    """The sinks as [N, J, 1, 1]."""
    if sink_H is None:
        return None
    n_rows, n_sharing = q_NJSC.shape[:2]
    return sink_H.view(-1, n_sharing).repeat(n_rows * n_sharing // len(sink_H), 1)[:, :, None, None]


def forward(q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, sink_H: Tensor | None, sight: Sight, scale: float) -> Tensor:
    """`attend`, [N, J, S, V], without gradients."""
    y_NJSV = q_NJSC.new_empty(*q_NJSC.shape[:3], v_NPV.shape[2])
    sink_NJ11 = _by_row(sink_H, q_NJSC)
    for work in _pieces(q_NJSC, k_NPC, sight):
        q_NJQC = q_NJSC[work.heads, :, work.queries]
        prob_NJQK, _ = _probabilities(q_NJQC, k_NPC[work.heads, work.keys], sink_NJ11, work, scale)
        y_NMV = torch.bmm(prob_NJQK.flatten(1, 2).to(v_NPV.dtype), v_NPV[work.heads, work.keys])
        y_NJSV[work.heads, :, work.queries] = y_NMV.unflatten(1, (q_NJSC.shape[1], -1))
    return y_NJSV


def backward(
    dy_NJSV: Tensor, q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, sink_H: Tensor | None, sight: Sight, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and the sinks: with p the probabilities and s the sink's share, dscore = p (dp - sum p dp), dsink = -s sum p dp."""
    sink_NJ11 = _by_row(sink_H, q_NJSC)
    dq_NJSC, dk_NPC, dv_NPV = torch.empty_like(q_NJSC), torch.zeros_like(k_NPC), torch.zeros_like(v_NPV)
    dsink_NJ = None if sink_NJ11 is None else sink_NJ11.new_zeros(q_NJSC.shape[:2])
    for work in _pieces(q_NJSC, k_NPC, sight):
        q_NJQC, dy_NJQV = q_NJSC[work.heads, :, work.queries], dy_NJSV[work.heads, :, work.queries]
        k_NKC, v_NKV = k_NPC[work.heads, work.keys], v_NPV[work.heads, work.keys]
        prob_NJQK, aside_NJQ1 = _probabilities(q_NJQC, k_NKC, sink_NJ11, work, scale)
        q_NMC, dy_NMV = q_NJQC.flatten(1, 2), dy_NJQV.flatten(1, 2).to(v_NKV.dtype)
        dprob_NJQK = torch.bmm(dy_NMV, v_NKV.transpose(1, 2)).view_as(prob_NJQK).to(prob_NJQK.dtype)
        pull_NJQ1 = (prob_NJQK * dprob_NJQK).sum(-1, keepdim=True)
        dv_NPV[work.heads, work.keys] += torch.bmm(prob_NJQK.flatten(1, 2).transpose(1, 2).to(dy_NMV.dtype), dy_NMV)
        dscore_NMK = dprob_NJQK.sub_(pull_NJQ1).mul_(prob_NJQK).mul_(scale).flatten(1, 2).to(q_NMC.dtype)
        dk_NPC[work.heads, work.keys] += torch.bmm(dscore_NMK.transpose(1, 2), q_NMC)
        dq_NJSC[work.heads, :, work.queries] = torch.bmm(dscore_NMK, k_NKC).unflatten(1, (q_NJSC.shape[1], -1))
        if dsink_NJ is not None and aside_NJQ1 is not None:
            dsink_NJ[work.heads] -= (aside_NJQ1 * pull_NJQ1).sum((-2, -1)).to(dsink_NJ.dtype)
    dsink_H = None if sink_H is None or dsink_NJ is None else dsink_NJ.view(-1, len(sink_H)).sum(0)
    return dq_NJSC, dk_NPC, dv_NPV, dsink_H


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, sink_H: Tensor | None, sight: Sight, scale: float) -> Tensor:
        ctx.save_for_backward(q_NJSC, k_NPC, v_NPV, sink_H)
        ctx.sight, ctx.scale = sight, scale
        return forward(q_NJSC, k_NPC, v_NPV, sink_H, sight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NJSV: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dy_NJSV, *ctx.saved_tensors, ctx.sight, ctx.scale), None, None
