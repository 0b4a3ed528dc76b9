"""Routers: how a token chooses its experts. Scores in float32 unless the spec says otherwise.

Letters: T tokens, D width, E experts, K chosen per token, G groups of experts.
Sources: softmax over all, then top-k (DeepSeek-V2, OLMoE); top-k, then softmax (Mixtral); sigmoid with selection bias and
node-limited groups (DeepSeek-V3, section 2.1.2); top-1 with input jitter (Switch, section 2.2 and 2.4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.routing import Decision
from spec import routing


class Router(nn.Module):
    """Scores every expert for every token and keeps `top_k`.

    `bias_E`, where the loss-free balancing is on, is added to the scores for the choice alone, never to the gates.
    """

    bias_E: Tensor | None

    def __init__(self, spec: routing.Router, d_model: int, n_experts: int, top_k: int, *, biased: bool) -> None:
        super().__init__()
        self.spec = spec
        self.top_k = top_k
        self.dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.register_buffer("bias_E", torch.zeros(n_experts) if biased else None)

    def forward(self, x_TD: Tensor) -> Decision:
        """Decide for every token of `x_TD`. Differentiable in x and the router's weights through gates and probabilities."""
        with torch.autocast(x_TD.device.type, enabled=False):
            dtype = torch.promote_types(self.dtype, x_TD.dtype) if x_TD.dtype == torch.float64 else self.dtype
            x_TD = x_TD.to(dtype)
            if self.training and self.spec.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.spec.jitter, 1 + self.spec.jitter)
            logits_TE = F.linear(x_TD, self.weight.to(dtype))
            score_TE = logits_TE.sigmoid() if self.spec.kind == "sigmoid_topk" else logits_TE.softmax(-1)
            expert_TK = self._select(score_TE.detach())
            gate_TK = self._gates(logits_TE, score_TE, expert_TK)
            prob_TE = score_TE / score_TE.sum(-1, keepdim=True) if self.spec.kind == "sigmoid_topk" else score_TE
        return Decision(logits_TE, prob_TE, expert_TK, gate_TK)

    def _select(self, choice_TE: Tensor) -> Tensor:
        """The K experts of highest selection score per token, only from the best groups where groups are limited."""
        if self.bias_E is not None:
            choice_TE = choice_TE + self.bias_E
        if self.spec.top_groups < self.spec.n_groups:
            choice_TE = limit_groups(choice_TE, self.spec.n_groups, self.spec.top_groups, self.spec.group_score)
        return top_k(choice_TE, self.top_k)

    def _gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        kind = self.spec.kind
        if kind == "topk_softmax":
            gate_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
        else:
            gate_TK = score_TE.gather(-1, expert_TK)
            if kind == "sigmoid_topk" or self.spec.renormalise:
                gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return gate_TK * self.spec.scale if self.spec.scale != 1 else gate_TK


def limit_groups(choice_TE: Tensor, n_groups: int, top_groups: int, group_score: str) -> Tensor:
    """-inf outside the `top_groups` best of `n_groups` equal, consecutive groups of experts.

    A group scores its best expert ("max", DeepSeek-V2) or the sum of its best two ("top2_sum", DeepSeek-V3).
    """
    choice_TGE = choice_TE.unflatten(-1, (n_groups, -1))
    score_TG = choice_TGE.amax(-1) if group_score == "max" else choice_TGE.topk(2, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(-1, top_k(score_TG, top_groups), True)
    limited_TE: Tensor = choice_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return limited_TE


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """Indices of the k highest of each row, highest first; int64[T, k]."""
    best: Tensor = score_TE.topk(k, dim=-1).indices
    return best
