"""Routers: how a token chooses its experts. Here: what scores them, and the kinds that take the k highest scores.

The other kinds have modules of their own (router_*.py); `router_kinds.build_router` makes the one that a spec names.
Letters: T tokens, D width, E experts, K chosen per token, G groups of experts, C dimensions of a narrower space.
Sources: softmax over all, then top-k (DeepSeek-V2, OLMoE); top-k, then softmax (Mixtral); sigmoid with selection bias and
node-limited groups (DeepSeek-V3, section 2.1.2); top-1 with input jitter (Switch, section 2.2 and 2.4); sigmoid gates on the
experts' input (Llama 4); cosine scores (Chi 2022, eq. 3-4).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import dispatch, router_naive
from kernels.router_naive import Rule, top_k
from moe.routing import Decision
from spec import routing

FIRST_TEMPERATURE = 0.3  # of cosine scores (Chi 2022, section 4.1)
LOWEST_TEMPERATURE = 0.01


class Router(nn.Module):
    """What every kind is: a function from tokens to a Decision. Scores are float32 unless the spec says otherwise.

    `bias_E`, where the loss-free balancing is on, is added to the scores for the choice alone, never to the gates.
    With `gate_on_input` a gate multiplies its expert's input instead of its output: y_t = sum_k FFN_k(g_tk x_t).
    """

    bias_E: Tensor | None

    def __init__(self, spec: routing.Router, n_experts: int, top_k: int, *, biased: bool) -> None:
        super().__init__()
        self.spec, self.n_experts, self.top_k = spec, n_experts, top_k
        self.gate_on_input = spec.kind == "sigmoid_input"
        self.dtype = torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32
        self.register_buffer("bias_E", torch.zeros(n_experts) if biased else None)

    def forward(self, x_TD: Tensor, tokens_T: Tensor | None = None) -> Decision:
        """Decide for every token of `x_TD`; `tokens_T` are the input's ids. Differentiable in x and the router's weights."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.decide(x_TD, tokens_T)

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """`forward`, outside autocast."""
        raise NotImplementedError

    def most_per_expert(self, n_tokens: int) -> int | None:
        """How many of `n_tokens` one expert takes at most, where the rule itself says so."""
        return None

    def gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """The gates of `expert_TK`, also of other experts than were decided on; no entry may be E."""
        raise NotImplementedError

    def arithmetic(self, x_TD: Tensor) -> torch.dtype:
        """The dtype to score `x_TD` in: the router's, or float64 for float64 input."""
        return torch.promote_types(self.dtype, x_TD.dtype) if x_TD.dtype == torch.float64 else self.dtype


class ScoringRouter(Router):
    """A router with a logit for every expert.

    Its scorer is `weight` [E, D] (linear), `down` [C, D] and `weight` [E, C] (mlp: with a GELU between them; cosine: the cosine
    of the two, over `temperature`), and `bias` [E] where the spec wants one.
    """

    down: nn.Parameter | None
    temperature: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: routing.Router, d_model: int, n_experts: int, top_k: int, *, biased: bool) -> None:
        super().__init__(spec, n_experts, top_k, biased=biased)
        narrow = spec.scorer != "linear"
        self.down = nn.Parameter(torch.empty(spec.scorer_dim, d_model)) if narrow else None
        self.weight = nn.Parameter(torch.empty(n_experts, spec.scorer_dim if narrow else d_model))
        self.temperature = nn.Parameter(torch.tensor(FIRST_TEMPERATURE)) if spec.scorer == "cosine" else None
        self.bias = nn.Parameter(torch.zeros(n_experts)) if spec.bias else None

    def prepared(self, x_TD: Tensor) -> Tensor:
        """`x_TD` in the router's dtype, in training times U(1 - jitter, 1 + jitter)."""
        x_TD = x_TD.to(self.arithmetic(x_TD))
        if self.training and self.spec.jitter:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.spec.jitter, 1 + self.spec.jitter)
        return x_TD

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, E], in the dtype of `x_TD`."""
        dtype = x_TD.dtype
        bias_E = None if self.bias is None else self.bias.to(dtype)
        if self.down is None:
            return F.linear(x_TD, self.weight.to(dtype), bias_E)
        z_TC = F.linear(x_TD, self.down.to(dtype))
        if self.temperature is None:
            return F.linear(F.gelu(z_TC), self.weight.to(dtype), bias_E)
        cosine_TE = F.linear(F.normalize(z_TC, dim=-1), F.normalize(self.weight.to(dtype), dim=-1))
        logits_TE = cosine_TE / self.temperature.to(dtype).clamp_min(LOWEST_TEMPERATURE)
        return logits_TE if bias_E is None else logits_TE + bias_E

    def gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """The scores of the experts, times the spec's scale."""
        return self.scaled(score_TE.gather(-1, expert_TK))

    def scaled(self, gate_TK: Tensor) -> Tensor:
        """Gates times the spec's scale."""
        return gate_TK * self.spec.scale if self.spec.scale != 1 else gate_TK


class TopKRouter(ScoringRouter):
    """Takes the k highest scores: softmax_topk, topk_softmax, sigmoid_topk, sigmoid_input, switch and all_experts."""

    def __init__(self, spec: routing.Router, d_model: int, n_experts: int, top_k: int, *, biased: bool) -> None:
        super().__init__(spec, d_model, n_experts, top_k, biased=biased)
        self.rule = rule(spec, top_k, biased=biased)

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide by softmax or sigmoid scores."""
        return self.take_best(self.logits(self.prepared(x_TD)))

    def take_best(self, logits_TE: Tensor) -> Decision:
        """The k highest of score + bias, only from the best groups where groups are limited, with their gates."""
        routed = dispatch.route(logits_TE, self.bias_E, self.rule)
        decision = Decision(logits_TE, **routed._asdict())
        if self.training and self.spec.random_share:
            expert_TK = self._strayed(routed.expert_TK)
            return decision._replace(expert_TK=expert_TK, gate_TK=self.gates(logits_TE, routed.score_TE, expert_TK), count_E=None)
        return decision

    def gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """Softmax of the kept logits (topk_softmax), else the kept scores, divided by their sum where kind or spec say so; scaled."""
        return router_naive.gates(logits_TE, score_TE, expert_TK, self.rule)

    def _strayed(self, expert_TK: Tensor) -> Tensor:
        """`expert_TK` with k uniformly drawn experts in place of a token's own, with the probability `random_share`."""
        stray_T1 = torch.rand(len(expert_TK), 1, device=expert_TK.device) < self.spec.random_share
        return torch.where(stray_T1, top_k(torch.rand(len(expert_TK), self.n_experts, device=expert_TK.device), self.top_k), expert_TK)


def rule(spec: routing.Router, top_k: int, *, biased: bool) -> Rule:
    """What a router that takes the k highest scores does with its logits."""
    sigmoid = spec.kind in ("sigmoid_topk", "sigmoid_input")
    whole = spec.kind in ("sigmoid_topk", "gshard", "noisy_topk") or spec.renormalise
    return Rule(
        top_k=top_k,
        score="sigmoid" if sigmoid else "softmax",
        gate="softmax" if spec.kind == "topk_softmax" else "normalised" if whole else "score",
        # Llama 4 compares logits: their sigmoids are all 1 from about 17 on.
        by_logit=spec.kind == "sigmoid_input" and not biased,
        scale=spec.scale,
        n_groups=spec.n_groups,
        top_groups=spec.top_groups,
        group_score=spec.group_score,
    )


def drawn(logits_TE: Tensor) -> Tensor:
    """int64[T, 1]: an expert for each token from the softmax of its logits, by the Gumbel-max trick."""
    noise_TE = torch.empty_like(logits_TE, dtype=torch.promote_types(logits_TE.dtype, torch.float32)).exponential_()
    return (logits_TE - noise_TE.log()).argmax(-1, keepdim=True)
