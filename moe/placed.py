"""Experts that lie on ranks by their load, for evaluation: hot ones on several, which share their tokens (`spec.placement` says who holds what).

Letters: L MoE layers, S slots over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moe.experts import Experts
from moe.model import Transformer
from moe.parallel import Mesh, Slots

_STACKED = ("w_in", "w_out", "b_in", "b_out")


@torch.no_grad()
def place_experts(model: Transformer, mesh: Mesh, expert_LS: Sequence[Sequence[int]]) -> None:
    """Turns a whole model, in place, into this rank's part of one whose experts lie as `expert_LS` says: the expert in each slot of each layer.

    Rank p of P that share the experts holds slots p * S / P to (p + 1) * S / P - 1. Outputs are the whole model's, but for rounding. For evaluation
    mode. Raises ValueError for a model whose experts are spread already, and where slots do not fit the model or the ranks.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    if len(layers) != len(expert_LS):
        raise ValueError(f"a placement of {len(expert_LS)} layers does not fit a model of {len(layers)} MoE layers")
    placed = [Slots.of(expert_S, experts.n_experts, mesh.expert) for experts, expert_S in zip(layers, expert_LS, strict=True)]
    for experts, slots, expert_S in zip(layers, placed, expert_LS, strict=True):
        if experts.mesh is not None:
            raise ValueError("the model's experts are spread over ranks already: a placement starts from all of them")
        own_S = torch.tensor(expert_S[mesh.held(slots.total)], device=experts.w_in.device)
        for name in _STACKED:
            weight = getattr(experts, name)
            if weight is not None:
                setattr(experts, name, nn.Parameter(weight[own_S], requires_grad=False))
        experts.mesh, experts.slots = mesh, slots
