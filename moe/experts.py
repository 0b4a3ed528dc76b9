"""The routed experts' weights, stacked, and the call of the operation that runs them, here or on the ranks that hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels import dispatch
from kernels.activation import GATED
from moe import parallel
from moe.laps import Laps
from moe.norm import product_dtype
from moe.parallel import Mesh, Routed, Slots


class Experts(nn.Module):
    """E feed-forward networks of width F: `w_in` [E, 2F, D] (gate rows first; [E, F, D] if ungated), `w_out` [E, D, F].

    With `biased` also `b_in` [E, 2F or F] and `b_out` [E, D] (gpt-oss). Where a `mesh` spreads them over ranks, each of these has a row
    for the experts that this rank holds alone.
    """

    b_in: nn.Parameter | None
    b_out: nn.Parameter | None

    def __init__(self, n_experts: int, d_model: int, d_expert: int, activation: str, *, biased: bool = False, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.n_experts, self.activation, self.mesh = n_experts, activation, mesh
        self.slots: Slots | None = None  # where experts are placed by load, which is for evaluation (moe.placed)
        self.casts: tuple[Tensor, Tensor] | None = None  # both matrices as products take them, while `Transformer.experts_cast` keeps them
        held = n_experts if mesh is None else n_experts // mesh.expert
        rows = 2 * d_expert if activation in GATED else d_expert
        self.w_in = nn.Parameter(torch.empty(held, rows, d_model))
        self.w_out = nn.Parameter(torch.empty(held, d_model, d_expert))
        self.b_in = nn.Parameter(torch.empty(held, rows)) if biased else None
        self.b_out = nn.Parameter(torch.empty(held, d_model)) if biased else None

    def forward(
        self,
        x_TD: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        capacity: int | None = None,
        most_rows: int | None = None,
        beside: Callable[[], Tensor] | None = None,
        laps: Laps | None = None,
    ) -> Routed:
        """sum_k gate_tk * FFN_expert_tk(x_t); expert E stands for a dropped assignment. Under autocast in its dtype.

        With a `capacity`, which no expert may exceed, every expert runs over exactly so many rows; `most_rows` as in
        `dispatch.expert_ffn`. `beside` is run too, while rows travel
        where the experts are spread over ranks.
        """
        x_TD = x_TD.to(product_dtype(x_TD))
        if self.mesh is None:
            y_TD = self._here(x_TD, expert_TK, gate_TK, capacity, most_rows, laps)
            return Routed(y_TD, None, None if beside is None else beside())

        n_slots = self.n_experts
        if self.slots is not None:
            if self.training:
                raise ValueError("experts that are placed by load are for evaluation mode")
            expert_TK, n_slots = self.slots.spread(expert_TK), self.slots.total

        def here(x_MD: Tensor, expert_M1: Tensor, gate_M1: Tensor) -> Tensor:
            return self._here(x_MD, expert_M1, gate_M1, None, None, laps)

        return parallel.expert_ffn(x_TD, expert_TK, gate_TK, n_slots, self.mesh, here, beside, laps)

    @torch.no_grad()
    def cast(self, dtype: torch.dtype) -> None:
        """Keeps both matrices in `dtype` for the forward and backward passes to come, until the weights change."""
        self.casts = self.w_in.to(dtype), self.w_out.to(dtype)

    @torch.no_grad()
    def draw(self, weight: Tensor, std: float) -> None:
        """Fills one of its parameters, drawn for all experts whatever this rank holds, so that the model does not depend on the ranks."""
        if self.mesh is None:
            weight.normal_(0.0, std)
        else:
            whole = torch.empty(self.n_experts, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
            weight.copy_(whole.normal_(0.0, std)[self.mesh.held(self.n_experts)])

    def _here(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, capacity: int | None, most_rows: int | None, laps: Laps | None) -> Tensor:
        """With the experts that this rank holds, numbered from 0."""
        lap = None if laps is None else laps.mark
        given = self.activation, self.b_in, capacity, most_rows, lap, self.casts
        y_TD = dispatch.expert_ffn(x_TD, self.w_in, self.w_out, expert_TK, gate_TK, *given)
        if laps is not None:
            y_TD = laps.enter("combine", y_TD)
        if self.b_out is None:
            return y_TD
        # A product with the gates, laid out by expert, adds the second bias whatever runs the rest, in a fixed order.
        gate_TE = gate_TK.new_zeros(len(x_TD), len(self.b_out) + 1).scatter(1, expert_TK, gate_TK)[:, :-1]
        return y_TD + gate_TE.to(x_TD.dtype) @ self.b_out.to(x_TD.dtype)
