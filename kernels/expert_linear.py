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
    n_experts = len(w_EBA)
    order_R = expert_R.argsort(stable=True)
    back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    count_E = torch.bincount(expert_R, minlength=n_experts)
    x_RA = x_RA[order_R]
    if x_RA.device.type == "cuda" and x_RA.dtype == torch.bfloat16 and all(width % 8 == 0 for width in w_EBA.shape[1:]):
        y_RB = F.grouped_mm(x_RA, w_EBA.to(x_RA.dtype).transpose(1, 2), offs=count_E.cumsum(0).int())
    else:
        parts = x_RA.split(count_E.tolist())
        y_RB = torch.cat([F.linear(part, w_BA.to(part.dtype)) for part, w_BA in zip(parts, w_EBA, strict=True)])
    return y_RB[back_R]
