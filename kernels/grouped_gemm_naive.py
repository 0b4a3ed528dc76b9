"""Grouped matrix products as a loop over experts: the twin of `grouped_gemm_triton`, and its oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.activation import GATED, hidden


def grouped_gemm(
    a: Tensor, w_EBA: Tensor, token_R: Tensor, end_E: list[int], *, gather: bool, activation: str = "none", bias_EB: Tensor | None = None
) -> Tensor:
    """out[r] = w[e] @ a[r] + bias[e], for the rows r of expert e, which end at end_E[e]; a's row is token_R[r] with `gather`.

    With an `activation`, of the result (gate half first where it is gated). Rows after the last expert's are zero.
    """
    n_outer = w_EBA.shape[1] // 2 if activation in GATED else w_EBA.shape[1]
    out = torch.zeros(len(token_R), n_outer, dtype=a.dtype, device=a.device)
    start = 0
    for expert, end in enumerate(end_E):
        rows = a[token_R[start:end].long()] if gather else a[start:end]
        product = rows @ w_EBA[expert].T if bias_EB is None else rows @ w_EBA[expert].T + bias_EB[expert]
        out[start:end] = product if activation == "none" else hidden(product, activation)
        start = end
    return out
