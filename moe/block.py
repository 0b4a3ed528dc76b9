"""One layer of a transformer: attention, then a feed-forward or MoE layer, each beside the residual stream."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moe.attention import build_attention
from moe.attention_experts import AttentionRouting, RoutedAttention
from moe.context import Context
from moe.feedforward import FeedForward
from moe.layer import MoeLayer
from moe.norm import build_norm
from moe.parallel import Mesh
from moe.routing import LayerOutput
from spec.model import Model


class BlockOutput(NamedTuple):
    """The residual stream after a block, and what the routers in it did."""

    x_BSD: Tensor
    ffn: LayerOutput | None  # of a MoE layer
    attention: AttentionRouting | None  # of attention experts


class Block(nn.Module):
    """Pre-norm residual block; with `sandwich_norm` each branch is normalised again before it is added (Grok-1)."""

    def __init__(self, spec: Model, layer: int, *, sparse: bool, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.attention_norm = build_norm(spec)
        self.attention = build_attention(spec, layer)
        self.ffn_norm = build_norm(spec)
        self.ffn: MoeLayer | FeedForward = MoeLayer(spec, mesh) if sparse else FeedForward(spec.d_model, spec.d_ff, spec.activation)
        self.attention_post_norm = build_norm(spec) if spec.sandwich_norm else None
        self.ffn_post_norm = build_norm(spec) if spec.sandwich_norm else None
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BSD: Tensor, context: Context) -> BlockOutput:
        """[B, S, D] to [B, S, D]."""
        attention = None
        if isinstance(self.attention, RoutedAttention):
            y_BSD, attention = self.attention(context.enter("attention", self.attention_norm(x_BSD)), context)
        else:
            y_BSD = self.attention(context.enter("attention", self.attention_norm(x_BSD)), context)
        y_BSD = context.enter("other", y_BSD)
        x_BSD = x_BSD + self.dropout(y_BSD if self.attention_post_norm is None else self.attention_post_norm(y_BSD))
        ffn: LayerOutput | None = None
        if isinstance(self.ffn, MoeLayer):
            ffn = self.ffn(self.ffn_norm(x_BSD), context)
            y_BSD = ffn.y_BSD
        else:
            y_BSD = self.ffn(context.enter("dense", self.ffn_norm(x_BSD)))
        y_BSD = context.enter("other", y_BSD)
        x_BSD = x_BSD + self.dropout(y_BSD if self.ffn_post_norm is None else self.ffn_post_norm(y_BSD))
        return BlockOutput(x_BSD, ffn, attention)
