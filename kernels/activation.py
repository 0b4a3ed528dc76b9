"""The feed-forward activations, shared by every implementation: names as in `spec.experiment.Model.activation`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

GATED = ("swiglu", "geglu")


def hidden(h: Tensor, activation: str) -> Tensor:
    """From the up-projection's output to the down-projection's input.

    `h` is [..., 2F] (gate half first) for swiglu and geglu, which give act(gate) * up of [..., F]; [..., F] for relu and gelu.
    GELU is the exact one (erf). Raises ValueError for an unknown activation.
    """
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "geglu":
        gate, up = h.chunk(2, dim=-1)
        return F.gelu(gate) * up
    if activation == "relu":
        return F.relu(h)
    if activation == "gelu":
        return F.gelu(h)
    raise ValueError(f"activation {activation!r} is not one of swiglu, geglu, relu, gelu")
