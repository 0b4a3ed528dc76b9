"""Grouped-query attention (Ainslie 2023) with what published models add to it: normalised or clamped queries and keys, windows and
chunks, sinks, layers without rotary positions.

Letters: B sequences, S tokens, P kept positions, D width, H query heads, G key-value heads, C dimensions of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.attend import attend, sight_of
from moe.context import Context
from moe.norm import RmsNorm, l2_norm
from moe.rope import attention_scale
from spec import attention as described
from spec.model import Model


class GroupedAttention(nn.Module):
    """What attention with heads of keys and values is, whatever projects to them.

    `sinks_H` [H], where there are sinks, are the logits that take attention away from the tokens (gpt-oss). `q_norm` and `k_norm` are
    [C] each per head, [H * C] and [G * C] over the full projection.
    """

    def __init__(self, spec: Model, attention: described.GroupedQueryAttention, layer: int) -> None:
        super().__init__()
        self.spec, self.layer, self.eps = attention, layer, spec.norm_eps
        self.window, self.chunk, self.rotates = attention.window_at(layer), attention.chunk_at(layer), attention.rotates_at(layer)
        self.n_heads, self.n_kv_heads, self.head_dim = attention.n_heads, attention.n_kv_heads, spec.head_dim
        self.width, self.kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.scale = attention_scale(spec, self.head_dim)

    def add_vectors(self) -> None:
        """The norms and the sinks: after the matrices, in whose order weights are drawn."""
        if self.spec.qk_norm in ("head", "full"):
            per_head = self.spec.qk_norm == "head"
            self.q_norm = RmsNorm(self.head_dim if per_head else self.width, self.eps)
            self.k_norm = RmsNorm(self.head_dim if per_head else self.kv_width, self.eps)
        self.sinks_H = nn.Parameter(torch.zeros(self.n_heads)) if self.spec.sinks else None

    def clipped(self, projected: Tensor) -> Tensor:
        """Within the bounds of `clip_qkv`, where there are any."""
        limit = self.spec.clip_qkv
        return projected if limit is None else projected.clamp(-limit, limit)

    def heads(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Projections [..., H * C] and [..., G * C] as heads [..., H, C], normalised, and in their positions where the layer has them."""
        kind = self.spec.qk_norm
        if kind == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if kind == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:
            q, k = context.rope.rotate(q), context.rope.rotate(k)
            return (l2_norm(q, self.eps), l2_norm(k, self.eps), v) if kind == "l2" else (q, k, v)
        floor = self.spec.temperature_floor
        return ((q * temperature(context.start, q, floor)).to(q.dtype) if floor else q), k, v

    def attend(self, q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor, sink_H: Tensor | None, context: Context) -> Tensor:
        """Attention to what the cache keeps and the new positions, [B, S, H * C]; then these are kept too."""
        k_BPGC, v_BPGC = context.with_past(self.layer, k_BSGC, v_BSGC)
        return attend(q_BSHC, k_BPGC, v_BPGC, sight_of(context, k_BPGC.shape[1], self.window, self.chunk), sink_H, self.scale)


class GroupedQueryAttention(GroupedAttention):
    """Heads of queries that share fewer heads of keys and values.

    `qkv.weight` [(H + 2 G) * C, D] holds queries, keys and values in this order; `out.weight` is [D, H * C].
    """

    def __init__(self, spec: Model, attention: described.GroupedQueryAttention, layer: int) -> None:
        super().__init__(spec, attention, layer)
        self.qkv = nn.Linear(spec.d_model, self.width + 2 * self.kv_width, bias=attention.bias)
        self.out = nn.Linear(self.width, spec.d_model, bias=attention.output_bias)
        self.add_vectors()

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        q, k, v = self.clipped(self.qkv(x_BSD)).split([self.width, self.kv_width, self.kv_width], dim=-1)
        q_BSHC, k_BSGC, v_BSGC = self.heads(q, k, v, context)
        y: Tensor = self.out(self.attend(q_BSHC, k_BSGC, v_BSGC, self.sinks_H, context))
        return y


def temperature(start: int, q_BSHC: Tensor, floor: int) -> Tensor:
    """1 + 0.1 ln(floor((position + 1) / floor) + 1), float32[S, 1, 1]: sharper attention far from the start (Llama 4)."""
    position_S = torch.arange(start + 1, start + q_BSHC.shape[1] + 1, device=q_BSHC.device)
    return (1 + 0.1 * torch.log1p((position_S // floor).float()))[:, None, None]
