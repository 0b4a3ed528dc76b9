"""The routed feed-forward with every expert over equally many rows, zeros included: as GShard and Switch run it under a capacity.

One batched product per matrix, of shapes that do not depend on the routing; the price is the rows that hold no token.

Letters: T tokens, D width, K experts chosen per token, E experts, C rows of each expert (its capacity), H = 2F (gated) or F, R = T * K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import hidden


def expert_ffn(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    activation: str,
    b_in_EH: Tensor | None = None,
    *,
    capacity: int,
) -> Tensor:
    """As `experts_naive.expert_ffn`, where no expert (but E, for dropped) occurs more than `capacity` times: what lies beyond would be lost.

    Nothing here waits for the device.
    """
    n_experts, n_rows = len(w_in_EHD), len(w_in_EHD) * capacity
    expert_R, slot_R = expert_TK.flatten().sort(stable=True)
    start_E = torch.searchsorted(expert_R, torch.arange(n_experts + 1, device=expert_R.device))
    place_R = torch.arange(len(expert_R), device=expert_R.device) - start_E[expert_R]
    fits_R = (expert_R < n_experts) & (place_R < capacity)
    row_R = torch.where(fits_R, expert_R * capacity + place_R, n_rows)
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, row_R).view_as(expert_TK)
    token_N = torch.full((n_rows + 1,), len(x_TD), device=x_TD.device).scatter_(0, row_R, slot_R // expert_TK.shape[1])[:n_rows]
    x_ECD = torch.cat((x_TD, x_TD.new_zeros(1, x_TD.shape[1])))[token_N].unflatten(0, (n_experts, capacity))
    h_ECH = torch.bmm(x_ECD, w_in_EHD.to(x_TD.dtype).transpose(1, 2))
    if b_in_EH is not None:
        h_ECH = h_ECH + b_in_EH.to(x_TD.dtype)[:, None]
    y_ND = torch.bmm(hidden(h_ECH, activation), w_out_EDF.to(x_TD.dtype).transpose(1, 2)).flatten(0, 1)
    y_TKD = torch.cat((y_ND, y_ND.new_zeros(1, y_ND.shape[1])))[row_TK]
    return (y_TKD * gate_TK.to(x_TD.dtype)[:, :, None]).sum(1)
