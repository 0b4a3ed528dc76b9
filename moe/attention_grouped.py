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


class GroupedQueryAttention(nn.Module):
    """Heads of queries that share fewer heads of keys and values.

    `qkv.weight` [(H + 2 G) * C, D] holds queries, keys and values in this order; `out.weight` is [D, H * C]; `sinks_H` [H], where there
    are sinks, the logits that take attention away from the tokens (gpt-oss). `q_norm` and `k_norm` are [C] each per head, [H * C] and
    [G * C] over the full projection.
    """

    def __init__(self, spec: Model, attention: described.GroupedQueryAttention, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = attention, layer
        self.window, self.chunk, self.rotates = attention.window_at(layer), attention.chunk_at(layer), attention.rotates_at(layer)
        self.n_heads, self.n_kv_heads, self.head_dim, self.eps = attention.n_heads, attention.n_kv_heads, spec.head_dim, spec.norm_eps
        self.scale = attention_scale(spec, self.head_dim)
        width = self.n_heads * self.head_dim
        kv_width = self.n_kv_heads * self.head_dim
        self.qkv = nn.Linear(spec.d_model, width + 2 * kv_width, bias=attention.bias)
        self.out = nn.Linear(width, spec.d_model, bias=attention.output_bias)
        if attention.qk_norm in ("head", "full"):
            per_head = attention.qk_norm == "head"
            self.q_norm = RmsNorm(self.head_dim if per_head else width, spec.norm_eps)
            self.k_norm = RmsNorm(self.head_dim if per_head else kv_width, spec.norm_eps)
        self.sinks_H = nn.Parameter(torch.empty(self.n_heads)) if attention.sinks else None

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        qkv = self.qkv(x_BSD)
        if self.spec.clip_qkv is not None:
            qkv = qkv.clamp(-self.spec.clip_qkv, self.spec.clip_qkv)
        q, k, v = qkv.split([part * self.head_dim for part in (self.n_heads, self.n_kv_heads, self.n_kv_heads)], dim=-1)
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHC, k_BSGC, v_BSGC = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        q_BSHC, k_BSGC = self._placed(q_BSHC, k_BSGC, context)
        k_BPGC, v_BPGC = context.with_past(self.layer, k_BSGC, v_BSGC)
        sight = sight_of(context, k_BPGC.shape[1], self.window, self.chunk)
        y: Tensor = self.out(attend(q_BSHC, k_BPGC, v_BPGC, sight, self.sinks_H, self.scale))
        return y

    def _placed(self, q_BSHC: Tensor, k_BSGC: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions, and normalised per head where they are."""
        if self.spec.qk_norm == "head":
            q_BSHC, k_BSGC = self.q_norm(q_BSHC), self.k_norm(k_BSGC)
        if not self.rotates:
            floor = self.spec.temperature_floor
            return (q_BSHC * temperature(context.start, q_BSHC, floor) if floor else q_BSHC), k_BSGC
        q_BSHC, k_BSGC = context.rope.rotate(q_BSHC), context.rope.rotate(k_BSGC)
        if self.spec.qk_norm == "l2":
            q_BSHC, k_BSGC = l2_norm(q_BSHC, self.eps), l2_norm(k_BSGC, self.eps)
        return q_BSHC, k_BSGC


def temperature(start: int, q_BSHC: Tensor, floor: int) -> Tensor:
    """1 + 0.1 ln(floor((position + 1) / floor) + 1), [S, 1, 1]: sharper attention far from the start (Llama 4)."""
    position_S = torch.arange(start + 1, start + q_BSHC.shape[1] + 1, device=q_BSHC.device)
    return (1 + 0.1 * torch.log1p((position_S // floor).float())).to(q_BSHC.dtype)[:, None, None]
