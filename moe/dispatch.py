"""Capacity: which assignments an expert that is over its limit drops.

Letters: T tokens, K chosen per token, E experts, R = T * K assignments in token order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spec.routing import Capacity


def limit(capacity: Capacity, n_tokens: int, top_k: int, n_experts: int, *, training: bool) -> int | None:
    """Assignments that one expert may take in a batch of `n_tokens`: ceil(factor * K * T / E), or None without a limit."""
    if capacity.kind == "dropless":
        return None
    factor = capacity.factor if training else capacity.eval_factor
    return math.ceil(factor * top_k * n_tokens / n_experts)


def drop_overflow(expert_TK: Tensor, gate_TK: Tensor, n_experts: int, most: int, drop: str) -> Tensor:
    """`expert_TK` with E in place of every assignment that does not fit into its expert's `most` places.

    drop "position" keeps the first in the batch (Switch, section 2.2), "probability" the highest gates (ties: the first).
    """
    expert_R = expert_TK.flatten()
    if drop == "position":
        order_R = expert_R.argsort(stable=True)
    else:
        by_gate_R = gate_TK.detach().flatten().argsort(descending=True, stable=True)
        order_R = by_gate_R[expert_R[by_gate_R].argsort(stable=True)]
    sorted_R = expert_R[order_R]
    start_E = torch.searchsorted(sorted_R, torch.arange(n_experts, device=expert_R.device))
    rank_R = torch.arange(len(sorted_R), device=expert_R.device) - start_E[sorted_R]
    kept_R = torch.where(rank_R < most, sorted_R, n_experts)
    return torch.empty_like(expert_R).scatter_(0, order_R, kept_R).view_as(expert_TK)
