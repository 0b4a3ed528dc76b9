"""Floating-point operations of attention scores and values; the matrices' are counted with the parameters."""

from __future__ import annotations

from spec.attention import LatentAttention
from spec.model import Model


def attention_flops(model: Model, s: int) -> int:
    """Scores and values of all layers per token, forward, rounded down to a whole number."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        heads, qk, v = attention.n_heads, attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim
        windowed, window = 0, s
    else:
        heads = attention.n_heads * (attention.experts.top_k if attention.experts else 1)
        qk = v = model.head_dim
        window = min(attention.sliding_window or s, s)
        windowed = model.n_layers - model.n_layers // attention.full_every if attention.sliding_window else 0
    causal = s * (s + 1) // 2
    pairs = (model.n_layers - windowed) * causal + windowed * (s * window - window * (window - 1) // 2)
    if model.encoder_layers:
        pairs += (model.encoder_layers + model.n_layers) * s * s
    return 2 * heads * (qk + v) * pairs // s
