"""The routed feed-forward as one reads it in a paper: a loop over experts. The oracle of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import hidden


def expert_ffn(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, b_in_EH: Tensor | None = None
) -> Tensor:
    """y_t = sum over k of gate_tk * FFN_expert_tk(x_t); slots whose expert is E (dropped) add nothing.

    H is 2F for gated activations, else F; `b_in_EH` is added before the activation. Differentiable in all but the experts.
    O(E) passes over the tokens.
    """
    y_TD = torch.zeros_like(x_TD)
    for expert in range(w_in_EHD.shape[0]):
        token_N, slot_N = (expert_TK == expert).nonzero(as_tuple=True)
        h_NH = x_TD[token_N] @ w_in_EHD[expert].T.to(x_TD.dtype)
        h_NF = hidden(h_NH if b_in_EH is None else h_NH + b_in_EH[expert].to(h_NH.dtype), activation)
        y_TD = y_TD.index_add(0, token_N, gate_TK[token_N, slot_N, None].to(x_TD.dtype) * (h_NF @ w_out_EDF[expert].T.to(x_TD.dtype)))
    return y_TD
