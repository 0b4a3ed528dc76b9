"""The feed-forward activations, shared by every implementation: names as in `spec.experiment.Model.activation`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu", "swiglu_clamped")
LIMIT, STEEPNESS = 7.0, 1.702  # of swiglu_clamped


def hidden(h: Tensor, activation: str) -> Tensor:
    """From the up-projection's output to the down-projection's input.

    `h` is [..., 2F] (gate half first) for the gated ones, which give act(gate) * up of [..., F]; [..., F] for relu and gelu.
    GELU is the exact one (erf). swiglu_clamped is that of gpt-oss: gate at most 7, up between -7 and 7, gate sigmoid(1.702 gate) (up + 1).
    Raises ValueError for an unknown activation.
    """
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "geglu":
        gate, up = h.chunk(2, dim=-1)
        return F.gelu(gate) * up
    if activation == "swiglu_clamped":
        gate, up = h.chunk(2, dim=-1)
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        return gate * (STEEPNESS * gate).sigmoid() * (up + 1)
    if activation == "relu":
        return F.relu(h)
    if activation == "gelu":
        return F.gelu(h)
    raise ValueError(f"activation {activation!r} is not one of swiglu, geglu, relu, gelu, swiglu_clamped")
