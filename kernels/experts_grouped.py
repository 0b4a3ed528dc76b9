"""The routed feed-forward through torch's own grouped matrix product: the path on CUDA in bfloat16 without Triton.

Letters: T tokens, D width, K experts chosen per token, E experts, F expert width, H = 2F (gated) or F, R = T * K assignments
sorted by expert. Nothing here waits for the device; every sum has a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activation import hidden


class _Spread(torch.autograd.Function):
    """Each token's row to its K assignments; backward the sum over them."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD[token_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_RD: Tensor) -> tuple[Tensor | None, ...]:
        (row_TK,) = ctx.saved_tensors
        return d_RD[row_TK].sum(1), None, None


class _Collect(torch.autograd.Function):
    """Sorted rows back to [T, K, D]; backward the permutation the other way."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, row_TK: Tensor, slot_R: Tensor) -> Tensor:
        ctx.save_for_backward(slot_R)
        return y_RD[row_TK]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TKD: Tensor) -> tuple[Tensor | None, ...]:
        (slot_R,) = ctx.saved_tensors
        return d_TKD.flatten(0, 1)[slot_R], None, None


def expert_ffn(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, b_in_EH: Tensor | None = None
) -> Tensor:
    """As `experts_naive.expert_ffn`, with products in x's dtype. Widths must make rows a multiple of 16 bytes (`F.grouped_mm`)."""
    expert_R, slot_R = expert_TK.flatten().sort(stable=True)
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(len(slot_R), device=slot_R.device)).view_as(expert_TK)
    end_E = torch.searchsorted(expert_R, torch.arange(w_in_EHD.shape[0], device=expert_R.device), right=True).int()
    kept_R1 = (expert_R < w_in_EHD.shape[0])[:, None]  # grouped_mm leaves rows after the last expert's unwritten, forward and backward
    x_RD = torch.where(kept_R1, _Spread.apply(x_TD, slot_R // expert_TK.shape[1], row_TK), 0)
    h_RH = F.grouped_mm(x_RD, w_in_EHD.to(x_TD.dtype).transpose(1, 2), offs=end_E)
    if b_in_EH is not None:  # added by a product with each row's unit vector, whose backward pass sums in a fixed order
        unit_RE = F.one_hot(expert_R, w_in_EHD.shape[0] + 1)[:, :-1].to(h_RH.dtype)
        h_RH = torch.where(kept_R1, h_RH + unit_RE @ b_in_EH.to(h_RH.dtype), 0)  # also keeps unwritten gradients from the bias
    y_RD = F.grouped_mm(hidden(h_RH, activation), w_out_EDF.to(x_TD.dtype).transpose(1, 2), offs=end_E)
    y_TKD: Tensor = _Collect.apply(torch.where(kept_R1, y_RD, 0), row_TK, slot_R)
    return (y_TKD * gate_TK.to(x_TD.dtype)[:, :, None]).sum(1)
