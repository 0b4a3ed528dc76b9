"""Balancing: what keeps a router from sending everything to a few experts.

Letters: T tokens, E experts, K chosen per token, B sequences, S tokens in a sequence, L MoE layers.
Every loss is unweighted here; the layer multiplies it by its coefficient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.routing import Decision
from spec.balance import BalanceLoss, BalanceTerm


def loss_terms(balance: Sequence[BalanceTerm]) -> tuple[BalanceLoss, ...]:
    """The terms that add to the loss, in the spec's order: all but the loss-free bias."""
    return tuple(term for term in balance if term.kind != "loss_free_bias")


def bias_update_rate(balance: Sequence[BalanceTerm]) -> float | None:
    """The loss-free bias's update rate, or None where it is not used."""
    return next((term.update_rate for term in balance if term.kind == "loss_free_bias"), None)


def loss(kind: str, decision: Decision, count_E: Tensor, batch: int) -> Tensor:
    """Value of one term over a micro-batch of `batch` sequences; `count_E` is the assignments of each expert."""
    if kind == "switch_aux":
        return switch_aux(decision.prob_TE, count_E)
    if kind == "sequence_aux":
        return sequence_aux(decision.prob_TE, decision.expert_TK, batch)
    if kind == "z_loss":
        return z_loss(decision.logits_TE)
    raise ValueError(f"balance term {kind!r} has no loss")


def switch_aux(prob_TE: Tensor, count_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i with f_i = n_i / (K T), the share of assignments, and P_i the mean probability (Fedus 2022, eq. 4-6).

    1 under perfect balance. The gradient flows through P alone.
    """
    share_E = count_E.to(prob_TE.dtype) / count_E.sum()
    return prob_TE.shape[-1] * (share_E @ prob_TE.mean(0))


def sequence_aux(prob_TE: Tensor, expert_TK: Tensor, batch: int) -> Tensor:
    """Mean over sequences of sum_i f_i P_i, f_i = E / (K S) n_i, both within the sequence (DeepSeek-V3, eq. 17-20)."""
    n_experts = prob_TE.shape[-1]
    prob_BE = prob_TE.unflatten(0, (batch, -1)).mean(1)
    expert_BR = expert_TK.reshape(batch, -1)
    count_BE = torch.zeros_like(prob_BE).scatter_add_(1, expert_BR, torch.ones_like(expert_BR, dtype=prob_BE.dtype))
    per_sequence_B: Tensor = n_experts / expert_BR.shape[1] * (count_BE * prob_BE).sum(-1)
    return per_sequence_B.mean()


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t (log sum_i exp(logit_ti))^2 (Zoph 2022, eq. 5): keeps the logits small."""
    return logits_TE.logsumexp(-1).square().mean()


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> None:
    """b_i += rate * sign(mean(c) - c_i), in place (Wang 2024, algorithm 1): overloaded experts become less eligible."""
    count_E = count_E.to(torch.float64)
    bias_E.add_((count_E.mean() - count_E).sign().to(bias_E.dtype), alpha=rate)
