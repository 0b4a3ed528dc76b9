"""Attention whose query and output projections are experts (ModuleFormer, section 3.1; JetMoE, section 2.3).

A token is routed to K of E pairs of projections. Each pair it is sent to attends with all H heads, over keys and values that all
pairs share; the results, each through its pair's output projection, are added, weighed by a softmax over the K highest logits.

Letters: B sequences, S tokens, T = B * S, D width, E experts, K chosen per token, H query heads of one expert, G key-value heads,
J = H / G, C dimensions of a head, Q = H * C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import dispatch
from moe import balance
from moe.attention_grouped import GroupedAttention
from moe.context import Context
from moe.norm import product_dtype
from spec import attention as described
from spec.model import Model


class AttentionRouting(NamedTuple):
    """What the router of one attention layer did. `loss` is its balancing term times its coefficient; the rest is detached."""

    loss: Tensor
    tokens_E: Tensor  # int64, assignments of each expert: they sum to T * K
    entropy: Tensor  # nats, mean over tokens


class RoutedAttention(GroupedAttention):
    """Attention with E query projections `w_q` [E, Q, D] (and `q_bias` [E, Q]) and output projections `w_out` [E, D, Q].

    `kv.weight` [2 * G * C, D] holds keys, then values; `router` [E, D]; `out_bias` [D]. The router is balanced as the model's MoE
    layers are where these have a switch_aux, with its coefficient.
    """

    def __init__(self, spec: Model, attention: described.GroupedQueryAttention, layer: int) -> None:
        super().__init__(spec, attention, layer)
        if attention.experts is None:
            raise ValueError("attention.experts is null: there is nothing to route to")
        n_experts, self.top_k = attention.experts.n_experts, attention.experts.top_k
        terms = spec.moe.balance if spec.moe else []
        self.coefficient = sum(term.coefficient for term in terms if term.kind == "switch_aux")
        self.router = nn.Parameter(torch.empty(n_experts, spec.d_model))
        self.w_q = nn.Parameter(torch.empty(n_experts, self.width, spec.d_model))
        self.q_bias = nn.Parameter(torch.empty(n_experts, self.width)) if attention.bias else None
        self.kv = nn.Linear(spec.d_model, 2 * self.kv_width, bias=attention.bias)
        self.w_out = nn.Parameter(torch.empty(n_experts, spec.d_model, self.width))
        self.out_bias = nn.Parameter(torch.empty(spec.d_model)) if attention.output_bias else None
        self.add_vectors()

    def forward(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, AttentionRouting]:
        """[B, S, D] to [B, S, D], and what the router did."""
        shape = x_BSD.shape[:2]
        x_TD = x_BSD.flatten(0, 1).to(product_dtype(x_BSD))
        expert_TK, gate_TK, routing = self._route(x_BSD.flatten(0, 1))
        expert_R = expert_TK.flatten()
        q_RQ = dispatch.expert_linear(x_TD.repeat_interleave(self.top_k, 0), self.w_q, expert_R)
        if self.q_bias is not None:
            q_RQ = q_RQ + self.q_bias[expert_R].to(q_RQ.dtype)
        k, v = self.clipped(self.kv(x_BSD)).chunk(2, dim=-1)
        q_BSKQ = self.clipped(q_RQ).view(*shape, self.top_k, -1)
        y_BSKQ = self._mix(q_BSKQ, k, v, context)
        y_RD = dispatch.expert_linear(y_BSKQ.reshape(-1, self.width), self.w_out, expert_R)
        y_TD = (y_RD.unflatten(0, (-1, self.top_k)) * gate_TK.to(y_RD.dtype).unsqueeze(-1)).sum(1)
        if self.out_bias is not None:
            y_TD = y_TD + self.out_bias.to(y_TD.dtype)
        return y_TD.view_as(x_BSD), routing

    def _mix(self, q_BSKQ: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attention of all chosen experts' heads at once, [B, S, K, Q]: those that share a key-value head are put side by side."""
        batch, length, top_k = q_BSKQ.shape[:3]
        q, k, v = self.heads(q_BSKQ.transpose(2, 1).reshape(batch * top_k, length, -1), k, v, context)
        q_BKSGJC = q.reshape(batch, top_k, length, self.n_kv_heads, -1, self.head_dim)
        q_BSHC = q_BKSGJC.permute(0, 2, 3, 1, 4, 5).flatten(2, 4)
        sink_H = None if self.sinks_H is None else self.sinks_H.view(self.n_kv_heads, 1, -1).expand(-1, top_k, -1).flatten()
        y = self.attend(q_BSHC, k, v, sink_H, context)
        y_BSGKJC = y.view(batch, length, self.n_kv_heads, top_k, -1, self.head_dim)
        return y_BSGKJC.transpose(2, 3).reshape(batch, length, top_k, -1)

    def _route(self, x_TD: Tensor) -> tuple[Tensor, Tensor, AttentionRouting]:
        """Experts and gates [T, K]; in float32 at least."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_TE = F.linear(x_TD.to(wide), self.router.to(wide))
            kept_TK, expert_TK = logits_TE.topk(self.top_k, dim=-1)
            prob_TE = logits_TE.softmax(-1)
            count_E = balance.counts(expert_TK, len(self.router))
            loss = self.coefficient * balance.switch_aux(prob_TE.mean(0), count_E) if self.coefficient else prob_TE.new_zeros(())
            with torch.no_grad():
                entropy = torch.special.entr(prob_TE).sum(-1).mean()
        return expert_TK, kept_TK.softmax(-1), AttentionRouting(loss, count_E, entropy)


def figures(layers: list[AttentionRouting]) -> dict[str, Tensor]:
    """Of all layers, for telemetry: mean entropy, and the weighted balancing loss."""
    return {
        "moa_entropy": torch.stack([layer.entropy for layer in layers]).mean().float(),
        "moa_balance": torch.stack([layer.loss.detach() for layer in layers]).sum().float(),
    }
