"""The routed feed-forward in Triton, forward and backward. Nothing here waits for the device; every sum has a fixed order.

Forward: gather, bias and activation inside the up-projection, then down, then gather-and-sum. For the backward pass the layer keeps its input
[T, D] and the up-projection's output H [R, H] alone: 2 T D + 4 T K F bytes in bfloat16 with SwiGLU (SonicMoE 2025, section 3.2).
It is one operation of `torch.library`, so that torch.compile sees no graph break.

Letters: T tokens, D width, K experts chosen per token, E experts, F expert width, H = 2F (gated) or F, R assignments sorted by expert:
T * K, or the most that are not dropped where that is known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.activation import GATED
from kernels.blocks import LayerBlocks, layer_blocks
from kernels.combine_triton import combine
from kernels.dispatch import make_tiles
from kernels.experts_backward_triton import hidden_gradient, row_sum, weight_gradient
from kernels.grouped_gemm_triton import Tiles, grouped_gemm
from kernels.tf32_triton import rounded


def expert_ffn(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    activation: str,
    b_in_EH: Tensor | None = None,
    most_rows: int | None = None,
    casts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `experts_naive.expert_ffn`, with products in x's dtype (float32 as `torch.set_float32_matmul_precision` says); the weights' and biases'
    gradients have their own.

    `most_rows`, where given, is how many assignments can be other than dropped: memory is taken for so many. More would be lost. `casts` are both
    weights in x's dtype, where somebody has cast them already; else each pass casts them anew.
    """
    n_rows = expert_TK.numel() if most_rows is None else min(expert_TK.numel(), most_rows)
    y_TD, _ = _expert_ffn(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, b_in_EH, activation, n_rows, torch.is_grad_enabled(), *(casts or ()))
    return y_TD


def _layer_blocks(x_TD: Tensor, w_out_EDF: Tensor, n_rows: int, activation: str) -> LayerBlocks:
    return layer_blocks(x_TD, len(w_out_EDF), w_out_EDF.shape[2], n_rows, gated=activation in GATED)


def _cast(weight: Tensor, cast: Tensor | None, x_TD: Tensor) -> Tensor:
    return weight.to(x_TD.dtype) if cast is None else cast


def _precision(dtype: torch.dtype) -> str:
    """What torch's own matrix products of float32 were told; without a meaning for other types."""
    return "tf32x3" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def _tiles(expert_TK: Tensor, n_experts: int, n_rows: int, block_rows: int) -> Tiles:
    """`make_tiles`, without the dropped assignments that n_rows leaves no place for."""
    tiles = make_tiles(expert_TK, n_experts, block_rows)
    if n_rows == len(tiles.token_R):
        return tiles
    n_tiles = -(-n_rows // block_rows) + min(n_experts, n_rows)
    by_row = {"token_R": tiles.token_R[:n_rows], "slot_R": tiles.slot_R[:n_rows]}
    return replace(tiles, **by_row, expert_M=tiles.expert_M[:n_tiles], start_M=tiles.start_M[:n_tiles])


@torch.library.custom_op("moelab::expert_ffn", mutates_args=())
def _expert_ffn(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    b_in_EH: Tensor | None,
    activation: str,
    n_rows: int,
    keep: bool,
    cast_in_EHD: Tensor | None = None,
    cast_out_EDF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer's output, and H where it is to be kept (else nothing: [0, H])."""
    w_in, w_out = _cast(w_in_EHD, cast_in_EHD, x_TD), _cast(w_out_EDF, cast_out_EDF, x_TD)
    blocks, precision = _layer_blocks(x_TD, w_out, n_rows, activation), _precision(x_TD.dtype)
    tiles = _tiles(expert_TK, len(w_in), n_rows, blocks.up.rows)
    h_RH = x_TD.new_empty(n_rows if keep else 0, w_in.shape[1])
    given: dict[str, Any] = {"bias_EB": b_in_EH, "kept": h_RH if keep else None, "blocks": blocks.up, "precision": precision}
    act_RF = grouped_gemm(rounded(x_TD, precision), w_in, tiles, gather=True, activation=activation, **given)
    y_RD = grouped_gemm(act_RF, w_out, tiles, gather=False, blocks=blocks.down, precision=precision)
    return combine(y_RD, tiles.row_TK, gate_TK, tiles.end_E[-1:]), h_RH


@_expert_ffn.register_fake
def _(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    b_in_EH: Tensor | None,
    activation: str,
    n_rows: int,
    keep: bool,
    cast_in_EHD: Tensor | None = None,
    cast_out_EDF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(n_rows if keep else 0, w_in_EHD.shape[1])


@torch.library.custom_op("moelab::expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    b_in_EH: Tensor | None,
    h_RH: Tensor,
    activation: str,
    cast_in_EHD: Tensor | None = None,
    cast_out_EDF: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, both weights, the gates and the biases ([0] without). The sorting is made again: cheaper than to keep it."""
    w_in, w_out, n_rows = _cast(w_in_EHD, cast_in_EHD, x_TD), _cast(w_out_EDF, cast_out_EDF, x_TD), len(h_RH)
    blocks, precision = _layer_blocks(x_TD, w_out, n_rows, activation), _precision(x_TD.dtype)
    tiles = _tiles(expert_TK, len(w_in), n_rows, blocks.hidden.rows)
    x_TD, dy_TD = rounded(x_TD, precision), rounded(dy_TD, precision)
    dh_RH, act_RF, dgate_R = hidden_gradient(dy_TD, w_out, h_RH, gate_TK, tiles, activation, blocks.hidden, precision)
    dx_RD = grouped_gemm(dh_RH, w_in.transpose(1, 2), tiles, gather=False, blocks=blocks.input, precision=precision)
    dx_TD = combine(dx_RD, tiles.row_TK, torch.ones_like(gate_TK), tiles.end_E[-1:])
    dw_in_EHD = weight_gradient(dh_RH, x_TD, tiles, gather="right", dtype=w_in_EHD.dtype, blocks=blocks.weight_in, precision=precision)
    dw_out_EDF = weight_gradient(dy_TD, act_RF, tiles, gather="left", dtype=w_out_EDF.dtype, blocks=blocks.weight_out, precision=precision)
    dgate_TK = torch.where(expert_TK < len(w_in), dgate_R[tiles.row_TK.clamp_max(n_rows - 1)], 0.0).to(gate_TK.dtype)
    db_in_EH = dh_RH.new_empty(0) if b_in_EH is None else row_sum(dh_RH, tiles, b_in_EH.dtype)
    return dx_TD, dw_in_EHD, dw_out_EDF, dgate_TK, db_in_EH


@_expert_ffn_backward.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    b_in_EH: Tensor | None,
    h_RH: Tensor,
    activation: str,
    cast_in_EHD: Tensor | None = None,
    cast_out_EDF: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    db_in_EH = h_RH.new_empty(0) if b_in_EH is None else torch.empty_like(b_in_EH)
    return torch.empty_like(x_TD), torch.empty_like(w_in_EHD), torch.empty_like(w_out_EDF), torch.empty_like(gate_TK), db_in_EH


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _n_rows, _keep, cast_in, cast_out = inputs
    ctx.save_for_backward(*tensors, output[1], cast_in, cast_out)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or H would get a gradient of zeros, as large as itself


def _backward(ctx: Any, dy_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # a checkpoint lets them be taken once
    if dy_TD is None:
        return (None,) * 11
    *tensors, cast_in, cast_out = saved
    dx, dw_in, dw_out, dgate, db_in = _expert_ffn_backward(dy_TD, *tensors, ctx.activation, cast_in, cast_out)
    return dx, dw_in, dw_out, None, dgate, None if saved[5] is None else db_in, None, None, None, None, None


_expert_ffn.register_autograd(_backward, setup_context=_keep)
