"""The routed experts' weights, stacked, and the call of the operation that runs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import dispatch
from kernels.activation import GATED
from moe.norm import product_dtype


class Experts(nn.Module):
    """E feed-forward networks of width F: `w_in` [E, 2F, D] (gate rows first; [E, F, D] if ungated), `w_out` [E, D, F].

    With `biased` also `b_in` [E, 2F or F] and `b_out` [E, D] (gpt-oss).
    """

    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(self, n_experts: int, d_model: int, d_expert: int, activation: str, *, biased: bool = False) -> None:
        super().__init__()
        self.activation = activation
        rows = 2 * d_expert if activation in GATED else d_expert
        self.w_in = nn.Parameter(torch.empty(n_experts, rows, d_model))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.b_in = nn.Parameter(torch.empty(n_experts, rows)) if biased else None
        self.b_out = nn.Parameter(torch.empty(n_experts, d_model)) if biased else None

    def forward(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, capacity: int | None = None) -> Tensor:
        """sum_k gate_tk * FFN_expert_tk(x_t); expert E stands for a dropped assignment. Under autocast in its dtype.

        With a `capacity`, which no expert may exceed, every expert runs over exactly so many rows.
        """
        x_TD = x_TD.to(product_dtype(x_TD))
        y_TD = dispatch.expert_ffn(x_TD, self.w_in, self.w_out, expert_TK, gate_TK, self.activation, self.b_in, capacity)
        if self.b_out is None:
            return y_TD
        # A product with the gates, laid out by expert, adds the second bias whatever runs the rest, in a fixed order.
        gate_TE = gate_TK.new_zeros(len(x_TD), len(self.b_out) + 1).scatter(1, expert_TK, gate_TK)[:, :-1]
        return y_TD + gate_TE.to(x_TD.dtype) @ self.b_out.to(x_TD.dtype)
