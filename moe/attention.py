"""Causal self-attention: the kind that the spec names."""

from __future__ import annotations

from moe.attention_experts import RoutedAttention
from moe.attention_grouped import GroupedQueryAttention
from moe.attention_latent import LatentAttention
from spec.model import Model


def build_attention(spec: Model, layer: int) -> GroupedQueryAttention | RoutedAttention | LatentAttention:
    """The attention of layer `layer` (from 0)."""
    if spec.attention.kind == "lightning":
        raise ValueError("attention.kind lightning is only priced")
    if spec.attention.kind == "mla":
        return LatentAttention(spec, spec.attention, layer)
    if spec.attention.experts is not None:
        return RoutedAttention(spec, spec.attention, layer)
    return GroupedQueryAttention(spec, spec.attention, layer)
