"""Causal self-attention: grouped-query (Ainslie 2023) and multi-head latent (DeepSeek-V2, section 2.1), with rotary positions.

Letters: B sequences, S tokens, D width, H query heads, G key-value heads, C dimensions of a
head (V of a value), R rotated dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import dispatch
from moe.context import Context
from moe.norm import RmsNorm
from spec import attention as described
from spec.model import Model


def attend(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGV: Tensor) -> Tensor:
    """Causal softmax attention; [B, S, H * V]. Key-value heads are shared by consecutive query heads."""
    y_BHSV = dispatch.attend(q_BSHC.transpose(1, 2), k_BSGC.transpose(1, 2), v_BSGV.transpose(1, 2))
    return y_BHSV.transpose(1, 2).flatten(2)


class GroupedQueryAttention(nn.Module):
    """Heads of queries that share fewer heads of keys and values; projections in one matrix (queries, keys, values)."""

    def __init__(self, spec: Model, attention: described.GroupedQueryAttention) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = attention.n_heads, attention.n_kv_heads, spec.head_dim
        width = self.n_heads * self.head_dim
        kv_width = self.n_kv_heads * self.head_dim
        self.qkv = nn.Linear(spec.d_model, width + 2 * kv_width, bias=attention.bias)
        self.out = nn.Linear(width, spec.d_model, bias=attention.output_bias)
        self.qk_norm = attention.qk_norm
        if attention.qk_norm != "none":
            per_head = attention.qk_norm == "head"
            self.q_norm = RmsNorm(self.head_dim if per_head else width, spec.norm_eps)
            self.k_norm = RmsNorm(self.head_dim if per_head else kv_width, spec.norm_eps)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        heads, kv_heads = self.n_heads, self.n_kv_heads
        q, k, v = self.qkv(x_BSD).split([heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim], dim=-1)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        y: Tensor = self.out(attend(context.rope.rotate(q), context.rope.rotate(k), v))
        return y


class LatentAttention(nn.Module):
    """Keys and values from one low-rank latent; the rotary part of the key is one head that all queries share."""

    def __init__(self, spec: Model, attention: described.LatentAttention) -> None:
        super().__init__()
        self.spec = attention
        q_width = attention.n_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        if attention.q_lora_rank:
            self.q_down = nn.Linear(spec.d_model, attention.q_lora_rank, bias=False)
            self.q_norm = RmsNorm(attention.q_lora_rank, spec.norm_eps)
            self.q_up = nn.Linear(attention.q_lora_rank, q_width, bias=False)
        else:
            self.q = nn.Linear(spec.d_model, q_width, bias=False)
        self.kv_down = nn.Linear(spec.d_model, attention.kv_lora_rank + attention.qk_rope_head_dim, bias=False)
        self.kv_norm = RmsNorm(attention.kv_lora_rank, spec.norm_eps)
        self.kv_up = nn.Linear(attention.kv_lora_rank, attention.n_heads * (attention.qk_nope_head_dim + attention.v_head_dim), bias=False)
        self.out = nn.Linear(attention.n_heads * attention.v_head_dim, spec.d_model, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        spec = self.spec
        q_flat = self.q_up(self.q_norm(self.q_down(x_BSD))) if spec.q_lora_rank else self.q(x_BSD)
        q_nope, q_rope = q_flat.unflatten(-1, (spec.n_heads, -1)).split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_down(x_BSD).split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, (spec.n_heads, -1))
        k_nope, v = kv.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        k_rope = context.rope.rotate(k_rope.unsqueeze(2)).expand(-1, -1, spec.n_heads, -1)
        q = torch.cat((q_nope, context.rope.rotate(q_rope)), dim=-1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        y: Tensor = self.out(attend(q, k, v))
        return y


def build_attention(spec: Model) -> GroupedQueryAttention | LatentAttention:
    """The attention that the spec names."""
    if spec.attention.kind == "mla":
        return LatentAttention(spec, spec.attention)
    return GroupedQueryAttention(spec, spec.attention)
