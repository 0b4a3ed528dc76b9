"""One matrix per expert: each row times the matrix of the expert that it was sent to.

Letters: R rows, E experts, A input width, B output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_linear(x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> Tensor:
    """y_r = w[expert_r] x_r, [R, B], in x's dtype; `expert_R` is int64, below E. Differentiable in x and w.

    On CUDA in bfloat16 one grouped product that does not wait for the device, where rows are a multiple of 16 bytes; else a product
    per expert.
    """
    order_R, back_R, end_E = _sorted(expert_R, len(w_EBA))
    x_RA = x_RA[order_R]
    if x_RA.device.type == "cuda" and x_RA.dtype == torch.bfloat16 and all(width % 8 == 0 for width in w_EBA.shape[1:]):
        y_RB = F.grouped_mm(x_RA, w_EBA.to(x_RA.dtype).transpose(1, 2), offs=end_E.int())
    else:
        parts = x_RA.tensor_split(end_E[:-1].cpu())
        y_RB = torch.cat([F.linear(part, w_BA.to(part.dtype)) for part, w_BA in zip(parts, w_EBA, strict=True)])
    return y_RB[back_R]


def gradients(dy_RB: Tensor, x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and w, for where torch does not keep the way back (`compiled.expert_linear`)."""
    order_R, _, end_E = _sorted(expert_R, len(w_EBA))
    sides = (side[order_R].tensor_split(end_E[:-1].cpu()) for side in (dy_RB, x_RA))
    dw_EBA = torch.stack([dy_NB.t() @ x_NA for dy_NB, x_NA in zip(*sides, strict=True)])
    return expert_linear(dy_RB, w_EBA.transpose(1, 2), expert_R), dw_EBA.to(w_EBA.dtype)


def _sorted(expert_R: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in the order of their experts, the way back, and the row after each expert's last."""
    order_R = expert_R.argsort(stable=True)
    back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    return order_R, back_R, torch.searchsorted(expert_R[order_R], torch.arange(n_experts, device=expert_R.device), right=True)
