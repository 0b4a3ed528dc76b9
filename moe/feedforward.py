"""The dense feed-forward layer: also the shared experts, which are one wide layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.activation import GATED, hidden


class FeedForward(nn.Module):
    """y = W_out act(W_in x); the gated activations hold gate and up projection in one matrix, gate rows first."""

    def __init__(self, d_model: int, width: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        rows = 2 * width if activation in GATED else width
        self.w_in = nn.Parameter(torch.empty(rows, d_model))
        self.w_out = nn.Parameter(torch.empty(d_model, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return F.linear(hidden(F.linear(x, self.w_in), self.activation), self.w_out)
