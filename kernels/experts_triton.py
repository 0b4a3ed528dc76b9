"""The routed feed-forward in Triton, forward only: gather and SwiGLU inside the up-projection, then down, then gather-and-sum."""

from __future__ import annotations

from torch import Tensor

from kernels.activation import hidden
from kernels.combine_triton import combine
from kernels.grouped_gemm_triton import Blocks, grouped_gemm, make_tiles


def expert_ffn(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, blocks: Blocks | None = None
) -> Tensor:
    """As `experts_naive.expert_ffn`, with products in x's dtype; not differentiable. Nothing here waits for the device."""
    w_in_EHD, w_out_EDF = w_in_EHD.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype)
    tiles = make_tiles(expert_TK, w_in_EHD.shape[0], (blocks or Blocks()).rows)
    if activation == "swiglu":
        act_RF = grouped_gemm(x_TD, w_in_EHD, tiles, gather=True, swiglu=True, blocks=blocks)
    else:
        act_RF = hidden(grouped_gemm(x_TD, w_in_EHD, tiles, gather=True, blocks=blocks), activation)
    y_RD = grouped_gemm(act_RF, w_out_EDF, tiles, gather=False, blocks=blocks)
    return combine(y_RD, tiles.row_TK, gate_TK, tiles.end_E[-1:])
