"""Rotary positions (Su 2021). Letters: B sequences, S tokens, H heads, R rotated dimensions.

Rotary pairs are neighbours, as in the paper; transformers' Llama and its kin pair dimension i with i + R/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec.model import Model


class Rope:
    """The rotation of positions 0 .. S-1: unit complex numbers [S, 1, R/2], exact to float32."""

    def __init__(self, length: int, width: int, theta: float, device: torch.device) -> None:
        inverse = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
        angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse)[:, None]
        self.turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(self, x_BSHR: Tensor) -> Tensor:
        """`x`, whose dimensions (2i, 2i + 1) are the parts of a complex number, turned by its position's angles (Su 2021, eq. 34)."""
        pairs = x_BSHR.to(torch.promote_types(x_BSHR.dtype, torch.float32)).unflatten(-1, (-1, 2))
        if pairs.device.type == "cpu":
            turned = torch.view_as_real(torch.view_as_complex(pairs) * self.turn)  # one pass over memory
        else:
            (first, second), cos, sin = pairs.unbind(-1), self.turn.real, self.turn.imag
            turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return turned.flatten(-2).to(x_BSHR.dtype)


def rotated_width(spec: Model) -> int:
    """Dimensions of a head that carry rotary position."""
    return spec.attention.qk_rope_head_dim if spec.attention.kind == "mla" else spec.head_dim
