"""Capacity: which assignments an expert that is over its limit gives up, and what becomes of them.

Letters: T tokens, K chosen per token, E experts, R = T * K assignments in token order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.balance import counts
from moe.router import Router
from moe.routing import Decision
from spec.routing import Capacity

_EVALUATION_SEED = 2**31 - 1


class Placed(NamedTuple):
    """Where the assignments ended. A slot that found no place holds expert E."""

    expert_TK: Tensor
    gate_TK: Tensor
    dropped_E: Tensor  # by the expert that was chosen
    rerouted: Tensor | None  # share of the assignments that moved to a next-best expert; None without such an offer


def limit(capacity: Capacity, n_tokens: int, top_k: int, n_experts: int, *, training: bool) -> int | None:
    """Assignments that one expert may take in a batch of `n_tokens`: ceil(factor * K * T / E), at most T; or None without a limit."""
    if capacity.kind == "dropless":
        return None
    factor = capacity.factor if training else capacity.eval_factor
    return min(n_tokens, math.ceil(factor * top_k * n_tokens / n_experts))


def place(decision: Decision, router: Router, most: int, capacity: Capacity) -> Placed:
    """What remains of the decision where an expert takes `most` assignments."""
    wanted_TK, n_experts = decision.expert_TK, router.n_experts
    rank_TK = priority(decision.gate_TK, capacity.drop, training=router.training)
    kept_TK = drop_overflow(wanted_TK, rank_TK, n_experts, most)
    gate_TK, rerouted = decision.gate_TK, None
    if capacity.overflow == "next_best":
        kept_TK, gate_TK, rerouted = _reroute(decision, router, kept_TK, rank_TK, most)
    lost_TK = torch.where(kept_TK == n_experts, wanted_TK, n_experts)
    return Placed(kept_TK, gate_TK, counts(lost_TK, n_experts), rerouted)


def priority(gate_TK: Tensor, drop: str, *, training: bool) -> Tensor | None:
    """Who comes first into a full expert: the highest. None means the first in the batch (Switch, section 2.2).

    "probability" is the gate, "random" a draw (random token selection); in evaluation the draw is the same each time.
    """
    if drop == "position":
        return None
    if drop == "probability":
        return gate_TK.detach()
    seeded = None if training else torch.Generator(gate_TK.device).manual_seed(_EVALUATION_SEED)
    return torch.rand(gate_TK.shape, generator=seeded, device=gate_TK.device)


def drop_overflow(expert_TK: Tensor, priority_TK: Tensor | None, n_experts: int, most: int | Tensor) -> Tensor:
    """`expert_TK` with E in place of every assignment that does not fit into its expert's `most` places (int, or int64[E]).

    The highest priorities stay, where they are equal the first in the batch. E itself stays E.
    """
    expert_R = expert_TK.flatten()
    if priority_TK is None:
        order_R = expert_R.argsort(stable=True)
    else:
        first_R = priority_TK.flatten().argsort(descending=True, stable=True)
        order_R = first_R[expert_R[first_R].argsort(stable=True)]
    sorted_R = expert_R[order_R]
    start_E = torch.searchsorted(sorted_R, torch.arange(n_experts + 1, device=expert_R.device))
    rank_R = torch.arange(len(sorted_R), device=expert_R.device) - start_E[sorted_R]
    most_R = most if isinstance(most, int) else torch.cat((most, most.new_zeros(1)))[sorted_R]
    kept_R = torch.where(rank_R < most_R, sorted_R, n_experts)
    return torch.empty_like(expert_R).scatter_(0, order_R, kept_R).view_as(expert_TK)


def _reroute(decision: Decision, router: Router, kept_TK: Tensor, priority_TK: Tensor | None, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offers every dropped assignment to the token's next-best expert with room; experts, gates, and the share that moved.

    A token whose experts changed gets the gates that its router gives to the new ones.
    """
    if decision.choice_TE is None or decision.score_TE is None:
        raise ValueError(f"a router of kind {router.spec.kind} has no next-best expert")
    n_experts, wanted_TK = router.n_experts, decision.expert_TK
    final_TK = offer(decision.choice_TE, wanted_TK, kept_TK, priority_TK, most)
    moved_TK = (kept_TK == n_experts) & (final_TK < n_experts)
    # Lost slots keep their part in the token's normalisation: their gates are those of the expert that was wanted.
    full_TK = torch.where(final_TK < n_experts, final_TK, wanted_TK)
    unused_T1 = decision.choice_TE.masked_fill(_used(full_TK, n_experts), -torch.inf).argmax(-1, keepdim=True)
    again_TK = router.gates(decision.logits_TE, decision.score_TE, torch.where(full_TK < n_experts, full_TK, unused_T1))
    gate_TK = torch.where(moved_TK.any(-1, keepdim=True), again_TK.to(decision.gate_TK.dtype), decision.gate_TK)
    return final_TK, gate_TK, moved_TK.sum() / (wanted_TK < n_experts).sum().clamp_min(1)


def offer(choice_TE: Tensor, wanted_TK: Tensor, kept_TK: Tensor, priority_TK: Tensor | None, most: int) -> Tensor:
    """`kept_TK` with what it lost of `wanted_TK` placed at each token's best other experts with room, in rounds until no offer is left.

    In a round each token offers its first lost slot; an expert that is offered more than it has room for takes the highest priorities.
    So every round fills an expert or places a slot of every token that offers, and there are at most K + E of them.
    """
    n_experts = choice_TE.shape[1]
    final_TK = kept_TK.clone()
    token_T = torch.arange(len(final_TK), device=final_TK.device)
    while True:
        room_E = most - counts(final_TK, n_experts)
        closed_TE = _used(final_TK, n_experts) | (room_E <= 0)
        best_T, expert_T = choice_TE.masked_fill(closed_TE, -torch.inf).max(-1)
        lost_TK = (wanted_TK < n_experts) & (final_TK == n_experts)
        slot_T = lost_TK.int().argmax(-1)
        offers_T = lost_TK.any(-1) & (best_T > -torch.inf)
        if not offers_T.any():
            return final_TK
        offered_T1 = torch.where(offers_T, expert_T, n_experts)[:, None]
        rank_T1 = None if priority_TK is None else priority_TK.gather(1, slot_T[:, None])
        taken_T = drop_overflow(offered_T1, rank_T1, n_experts, room_E.clamp_min(0)).squeeze(1)
        final_TK[token_T, slot_T] = torch.where(taken_T < n_experts, taken_T, final_TK[token_T, slot_T])


def _used(expert_TK: Tensor, n_experts: int) -> Tensor:
    """bool[T, E]: which experts a token has."""
    used = torch.zeros(len(expert_TK), n_experts + 1, dtype=torch.bool, device=expert_TK.device)
    return used.scatter_(1, expert_TK, True)[:, :n_experts]
