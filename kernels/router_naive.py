"""Scores to a choice of experts with gates, in plain torch: what runs on CPUs, and the twin of `router_triton`.

Letters: T tokens, E experts, K chosen per token, G groups of experts.
Sources: softmax over all, then top-k (DeepSeek-V2, OLMoE); top-k, then softmax (Mixtral); sigmoid with selection bias and
node-limited groups (DeepSeek-V3, section 2.1.2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LOWEST_SUM = 1e-20  # Scores that a token's experts were not chosen by (bias, groups, chance) may all be 0 in float32.


class Rule(NamedTuple):
    """How logits become scores, scores a choice, and a choice gates.

    The choice is by score, or `by_logit`; from all experts, or from the `top_groups` best of `n_groups` equal, consecutive groups, each of
    which scores its best expert ("max") or the sum of its best two ("top2_sum"). A gate is the score ("score"), the score
    divided by the sum of the token's chosen scores ("normalised"), or the softmax of the chosen logits ("softmax"); times `scale`.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    gate: Literal["score", "normalised", "softmax"] = "score"
    by_logit: bool = False
    scale: float = 1.0
    n_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"

    @property
    def limited(self) -> bool:
        """Whether a token may not choose from every group."""
        return self.top_groups < self.n_groups


class Routed(NamedTuple):
    """What `route` gives, in the logits' dtype unless said. Differentiable: probabilities, gates, scores, mean probabilities."""

    prob_TE: Tensor  # the scores as a distribution over experts
    expert_TK: Tensor  # int64, highest choice first
    gate_TK: Tensor
    score_TE: Tensor
    choice_TE: Tensor  # what was compared: scores or logits, with the bias (then float32); -inf outside the token's groups
    count_E: Tensor  # int64: tokens that chose the expert
    prob_E: Tensor  # mean over tokens; at least float32


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> Routed:
    """The k experts of highest choice for every token, with their gates; `bias_E` is added for the choice alone."""
    if rule.score == "softmax":
        score_TE = prob_TE = logits_TE.softmax(-1)
    else:
        score_TE = logits_TE.sigmoid()
        prob_TE = normalised(score_TE)
    choice_TE = (logits_TE if rule.by_logit else score_TE).detach()
    if bias_E is not None:
        choice_TE = choice_TE + bias_E
    if rule.limited:
        choice_TE = limit_groups(choice_TE, rule.n_groups, rule.top_groups, rule.group_score)
    expert_TK = top_k(choice_TE, rule.top_k)
    prob_E = prob_TE.mean(0, dtype=torch.promote_types(prob_TE.dtype, torch.float32))
    return Routed(prob_TE, expert_TK, gates(logits_TE, score_TE, expert_TK, rule), score_TE, choice_TE, counts(expert_TK, logits_TE.shape[1]), prob_E)


def gates(logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor, rule: Rule) -> Tensor:
    """The gates of `expert_TK` by the rule; no entry may be E."""
    if rule.gate == "softmax":
        gate_TK = logits_TE.gather(-1, expert_TK).softmax(-1)
    else:
        gate_TK = score_TE.gather(-1, expert_TK)
        if rule.gate == "normalised":
            gate_TK = normalised(gate_TK)
    return gate_TK * rule.scale if rule.scale != 1 else gate_TK


def limit_groups(choice_TE: Tensor, n_groups: int, top_groups: int, group_score: str) -> Tensor:
    """-inf outside the `top_groups` best of `n_groups` equal, consecutive groups of experts.

    A group scores its best expert ("max", DeepSeek-V2) or the sum of its best two ("top2_sum", DeepSeek-V3).
    """
    choice_TGE = choice_TE.unflatten(-1, (n_groups, -1))
    score_TG = choice_TGE.amax(-1) if group_score == "max" else choice_TGE.topk(2, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(-1, top_k(score_TG, top_groups), True)
    limited_TE: Tensor = choice_TGE.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return limited_TE


def normalised(score: Tensor) -> Tensor:
    """Scores divided by the sum of their row; zeros stay zeros."""
    return score / score.sum(-1, keepdim=True).clamp_min(LOWEST_SUM)


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """Indices of the k highest of each row, highest first, equal ones in any order; int64[T, k]."""
    best: Tensor = score_TE.topk(k, dim=-1).indices
    return best


def counts(expert_TK: Tensor, n_experts: int) -> Tensor:
    """int64[E]: assignments of each expert; slots that hold expert E count nowhere. Does not wait for the device, as `torch.bincount` would."""
    expert_R = expert_TK.flatten()
    return expert_R.new_zeros(n_experts + 1).scatter_add_(0, expert_R, torch.ones_like(expert_R))[:n_experts]
