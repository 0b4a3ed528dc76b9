"""The routed experts' weights, stacked, and the call of the operation that runs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import dispatch
from kernels.activation import GATED
from moe.norm import product_dtype


class Experts(nn.Module):
    """E feed-forward networks of width F without biases: `w_in` [E, 2F, D] (gate rows first; [E, F, D] if ungated), `w_out` [E, D, F]."""

    def __init__(self, n_experts: int, d_model: int, d_expert: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        rows = 2 * d_expert if activation in GATED else d_expert
        self.w_in = nn.Parameter(torch.empty(n_experts, rows, d_model))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """sum_k gate_tk * FFN_expert_tk(x_t); expert E stands for a dropped assignment. Under autocast in its dtype."""
        return dispatch.expert_ffn(x_TD.to(product_dtype(x_TD)), self.w_in, self.w_out, expert_TK, gate_TK, self.activation)
