"""Balancing: what keeps a router from sending everything to a few experts.

Letters: T tokens, E experts, K chosen per token, B sequences, S tokens in a sequence, L MoE layers, V devices.
Every loss is unweighted here; the layer multiplies it by its coefficient. Slots that hold expert E were not chosen and count nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import router_naive
from moe.routing import Decision, Noise
from spec.balance import BalanceLoss, BalanceTerm
from spec.moe import Moe
from spec.routing import Router

_LOWEST_STD = 1e-10  # Below it softplus nears 0, and the gradient of a quotient by 0 is no number.


def loss_terms(balance: Sequence[BalanceTerm]) -> tuple[BalanceLoss, ...]:
    """The terms that add to the loss, in the spec's order: all but the loss-free bias."""
    return tuple(term for term in balance if term.kind != "loss_free_bias")


def bias_update_rate(balance: Sequence[BalanceTerm]) -> float | None:
    """The loss-free bias's update rate, or None where it is not used."""
    return next((term.update_rate for term in balance if term.kind == "loss_free_bias"), None)


def loss(term: BalanceTerm, decision: Decision, count_E: Tensor, batch: int, moe: Moe) -> Tensor:
    """Value of one term over a micro-batch of `batch` sequences; `count_E` is the assignments of each expert.

    global_aux needs more than one layer and micro-batch: here it is 0, and moe.balance_global puts its value in the place.
    """
    prob_TE = decision.prob_TE
    match term.kind:
        case "switch_aux":
            return switch_aux(mean_prob(decision), count_E if term.choices == "all" else counts(decision.expert_TK[:, :1], len(count_E)))
        case "sequence_aux":
            return sequence_aux(prob_TE, preferred(decision, moe), batch)
        case "device_aux":
            return device_aux(mean_prob(decision), count_E, term.n_devices)
        case "communication_aux":
            return communication_aux(
                mean_prob(decision), decision.expert_TK, term.n_devices, devices_per_token(moe.router, moe.top_k, term.n_devices)
            )
        case "importance_cv2":
            return importance_cv2(decision.expert_TK, decision.gate_TK, len(count_E))
        case "load_cv2":
            return load_cv2(decision.noise, decision.choice_TE, moe.top_k, count_E)
        case "z_loss":
            return z_loss(decision.logits_TE)
        case "global_aux":
            return torch.zeros((), dtype=_exact(prob_TE), device=prob_TE.device)
    raise ValueError(f"balance term {term.kind!r} has no loss")


def counts(expert_TK: Tensor, n_experts: int) -> Tensor:
    """int64[E]: assignments of each expert. Does not wait for the device."""
    return router_naive.counts(expert_TK, n_experts)


def mean_prob(decision: Decision) -> Tensor:
    """P: each expert's probability, the mean over the tokens; [E], differentiable, at least float32."""
    return _mean(decision.prob_TE) if decision.prob_E is None else decision.prob_E


def switch_aux(prob_E: Tensor, count_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i with f_i = n_i / sum n, the share of assignments, and P_i the mean probability (Fedus 2022, eq. 4-6).

    1 under perfect balance. The gradient flows through P alone.
    """
    return len(prob_E) * (_share(count_E, prob_E.dtype) @ prob_E)


def device_aux(prob_E: Tensor, count_E: Tensor, n_devices: int) -> Tensor:
    """sum_v f'_v P'_v: f'_v the mean of E n_i / sum n over a device's experts, P'_v the sum of their P_i (DeepSeek-V2, eq. 26-28).

    Devices hold equal, consecutive parts of the experts. 1 under perfect balance.
    """
    share_V = (len(count_E) * _share(count_E, prob_E.dtype)).view(n_devices, -1).mean(1)
    return share_V @ prob_E.view(n_devices, -1).sum(1)


def communication_aux(prob_E: Tensor, expert_TK: Tensor, n_devices: int, most: int) -> Tensor:
    """sum_v f''_v P''_v: f''_v = V / (M T) times the tokens that were sent to the device (DeepSeek-V2, eq. 29-31).

    A token counts once on a device, however many of its experts are there; `most` is M, the devices that a token may go to.
    """
    n_tokens, n_experts = len(expert_TK), len(prob_E)
    sent_TV = torch.zeros(n_tokens, n_devices + 1, dtype=torch.bool, device=prob_E.device)
    sent_TV.scatter_(1, expert_TK // (n_experts // n_devices), True)  # E lands in the last column
    sent_V = sent_TV.sum(0)[:n_devices].to(prob_E.dtype)
    return n_devices / (most * n_tokens) * (sent_V @ prob_E.view(n_devices, -1).sum(1))


def devices_per_token(router: Router, top_k: int, n_devices: int) -> int:
    """M of communication_aux: the devices that k experts can reach, within the groups that a token may choose from where these lie on whole
    devices, or devices hold whole groups.
    """
    groups, kept = router.n_groups, router.top_groups
    if kept < groups and n_devices % groups == 0:
        return min(top_k, kept * (n_devices // groups))
    if kept < groups and groups % n_devices == 0:
        return min(top_k, kept, n_devices)
    return min(top_k, n_devices)


def preferred(decision: Decision, moe: Moe) -> Tensor:
    """int64[T, K]: the experts of the token's highest scores among all, which f counts in DeepSeek-V3's eq. 18; the choice itself where neither a
    selection bias nor groups change it.

    With the choice in their place the term would see the loads that the bias has evened out, and leave the scores alone.
    """
    if bias_update_rate(moe.balance) is None and moe.router.top_groups == moe.router.n_groups:
        return decision.expert_TK
    return router_naive.top_k(decision.prob_TE.detach(), moe.top_k)


def sequence_aux(prob_TE: Tensor, expert_TK: Tensor, batch: int) -> Tensor:
    """Mean over sequences of sum_i f_i P_i, f_i = E n_i / sum n, both within the sequence (DeepSeek-V3, eq. 17-20).

    n counts `expert_TK`, in the paper the experts of the highest scores (`preferred`).
    """
    n_experts = prob_TE.shape[-1]
    prob_BE = prob_TE.unflatten(0, (batch, -1)).mean(1)
    expert_BR = expert_TK.reshape(batch, -1)
    count_BE = torch.zeros(batch, n_experts + 1, dtype=_exact(prob_TE), device=prob_TE.device)
    count_BE = count_BE.scatter_add_(1, expert_BR, torch.ones_like(expert_BR, dtype=count_BE.dtype))[:, :n_experts]
    per_sequence_B: Tensor = n_experts / count_BE.sum(-1).clamp_min(1) * (count_BE * prob_BE).sum(-1)
    return per_sequence_B.mean()


def importance_cv2(expert_TK: Tensor, gate_TK: Tensor, n_experts: int) -> Tensor:
    """Squared coefficient of variation of each expert's gates, summed over the tokens (Shazeer 2017, eq. 6-7)."""
    gate_TE = gate_TK.new_zeros(len(gate_TK), n_experts + 1).scatter(1, expert_TK, gate_TK)[:, :n_experts]
    return cv2(gate_TE.sum(0, dtype=_exact(gate_TK)))


def load_cv2(noise: Noise | None, choice_TE: Tensor | None, top_k: int, count_E: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' smooth loads, sum_t P(t, i) (Shazeer 2017, eq. 8-11); without noise of the counts.

    P(t, i) = Phi((clean_ti - kth highest noisy logit of the others) / std_ti): the probability that i is chosen if its noise alone is drawn
    anew. Experts outside the token's groups (choice_TE -inf) have none.
    """
    if noise is None:
        return cv2(count_E.to(torch.float32))
    clean_TE, std_TE, noisy_TE = (part_TE.to(_exact(part_TE)) for part_TE in noise)
    n_experts = len(count_E)
    closed_TE = torch.zeros_like(noisy_TE, dtype=torch.bool) if choice_TE is None else choice_TE == -torch.inf
    if top_k == n_experts:
        return cv2((~closed_TE).sum(0).to(noisy_TE.dtype))
    best_TN = noisy_TE.masked_fill(closed_TE, -torch.inf).topk(top_k + 1, dim=-1).values
    last_T1, next_T1 = best_TN[:, top_k - 1 : top_k], best_TN[:, top_k:]
    threshold_TE = torch.where(noisy_TE > next_T1, next_T1, last_T1)
    alone_TE = threshold_TE == -torch.inf  # no more than k experts are open: chosen whatever the noise
    margin_TE = (clean_TE - threshold_TE.masked_fill(alone_TE, 0.0)) / std_TE.clamp_min(_LOWEST_STD)
    chance_TE = torch.special.ndtr(margin_TE).masked_fill(alone_TE, 1.0).masked_fill(closed_TE, 0.0)
    return cv2(chance_TE.sum(0))


def cv2(total_E: Tensor) -> Tensor:
    """(standard deviation / mean)^2 over the experts; 0 where all are 0."""
    return total_E.var(correction=0) / total_E.mean().square().clamp_min(1e-10)


def z_loss(logits_TE: Tensor) -> Tensor:
    """mean_t (log sum_i exp(logit_ti))^2 (Zoph 2022, eq. 5): keeps the logits small."""
    return logits_TE.logsumexp(-1).square().mean()


def _share(count_E: Tensor, dtype: torch.dtype) -> Tensor:
    return count_E.to(dtype) / count_E.sum().clamp_min(1)


def _mean(prob_TE: Tensor) -> Tensor:
    return prob_TE.mean(0, dtype=_exact(prob_TE))


def _exact(x: Tensor) -> torch.dtype:
    """Counts beyond 256 are not whole numbers in bfloat16."""
    return torch.promote_types(x.dtype, torch.float32)


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, rate: float) -> None:
    """b_i += rate * sign(mean(c) - c_i), in place (Wang 2024, algorithm 1): overloaded experts become less eligible."""
    count_E = count_E.to(torch.float64)
    bias_E.add_((count_E.mean() - count_E).sign().to(bias_E.dtype), alpha=rate)
