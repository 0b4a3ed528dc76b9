"""Causal self-attention: the kind that the spec names."""

from __future__ import annotations

from moe.attention_experts import RoutedAttention
from moe.attention_grouped import GroupedQueryAttention
from moe.attention_latent import LatentAttention
from moe.rope import attention_scale
from spec.model import Model


def is_masked(spec: Model) -> bool:
    """Whether some layer's attention is not plainly causal, documents aside: it has a window, chunks, sinks or a scale of its own."""
    attention = spec.attention
    if attention.kind == "gqa" and (attention.sinks or attention.sliding_window is not None or attention.chunk is not None):
        return True
    return attention_scale(spec, 1) is not None


def build_attention(spec: Model, layer: int) -> GroupedQueryAttention | RoutedAttention | LatentAttention:
    """The attention of layer `layer` (from 0)."""
    if spec.attention.kind == "lightning":
        raise ValueError("attention.kind lightning is only priced")
    if spec.attention.kind == "mla":
        return LatentAttention(spec, spec.attention, layer)
    if spec.attention.experts is not None:
        return RoutedAttention(spec, spec.attention, layer)
    return GroupedQueryAttention(spec, spec.attention, layer)
