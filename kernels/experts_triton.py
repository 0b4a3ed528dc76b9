"""The routed feed-forward in Triton, forward and backward. Nothing here waits for the device; every sum has a fixed order.

Forward: gather and activation inside the up-projection, then down, then gather-and-sum. For the backward pass the layer keeps its input
[T, D] and the up-projection's output H [R, H] alone: 2 T D + 4 T K F bytes in bfloat16 with SwiGLU (SonicMoE 2025, section 3.2).
It is one operation of `torch.library`, so that torch.compile sees no graph break.

Letters: T tokens, D width, K experts chosen per token, E experts, F expert width, H = 2F (gated) or F, R = T * K assignments
sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.activation import GATED
from kernels.combine_triton import combine
from kernels.dispatch import make_tiles
from kernels.experts_backward_triton import hidden_gradient, weight_gradient
from kernels.grouped_gemm_triton import Blocks, Kernel, Tiles, grouped_gemm, usual

SMALL = Blocks(rows=16, outer=16, inner=16, warps=4, stages=1)
"""For the interpreter, which takes as long for an empty tile as for a full one."""


def expert_ffn(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, blocks: Blocks | None = None
) -> Tensor:
    """As `experts_naive.expert_ffn`, with products in x's dtype; weight gradients have the weights' dtype.

    `blocks` are the forward pass's tile sizes, for measurements without gradients; usually the device's own.
    """
    if blocks is not None:
        return _forward(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, None, blocks)[0]
    y_TD, _ = _expert_ffn(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, torch.is_grad_enabled())
    return y_TD


def _blocks(x_TD: Tensor, kernel: Kernel) -> Blocks:
    return usual(x_TD, kernel) if x_TD.is_cuda else SMALL


def _forward(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, h_RH: Tensor | None, blocks: Blocks | None
) -> tuple[Tensor, Tiles]:
    w_in_EHD, w_out_EDF = w_in_EHD.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype)
    up, down = blocks or _blocks(x_TD, "gated" if activation in GATED else "plain"), blocks or _blocks(x_TD, "plain")
    tiles = make_tiles(expert_TK, w_in_EHD.shape[0], up.rows)
    act_RF = grouped_gemm(x_TD, w_in_EHD, tiles, gather=True, activation=activation, kept=h_RH, blocks=up)
    y_RD = grouped_gemm(act_RF, w_out_EDF, tiles, gather=False, blocks=down)
    return combine(y_RD, tiles.row_TK, gate_TK, tiles.end_E[-1:]), tiles


@torch.library.custom_op("moelab::expert_ffn", mutates_args=())
def _expert_ffn(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The layer's output, and H where it is to be kept (else nothing: [0, H])."""
    h_RH = x_TD.new_empty(expert_TK.numel() if keep else 0, w_in_EHD.shape[1])
    return _forward(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, h_RH if keep else None, None)[0], h_RH


@_expert_ffn.register_fake
def _(x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(expert_TK.numel() if keep else 0, w_in_EHD.shape[1])


@torch.library.custom_op("moelab::expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    dy_TD: Tensor, x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, h_RH: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, both weights and the gates. The sorting is made again: cheaper than to keep it."""
    w_in, w_out = w_in_EHD.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype)
    wide, narrow = _blocks(x_TD, "plain"), _blocks(x_TD, "gradient")
    tiles = make_tiles(expert_TK, w_in.shape[0], wide.rows)
    dh_RH, act_RF, dgate_R = hidden_gradient(dy_TD, w_out, h_RH, gate_TK, tiles, activation, narrow)
    dx_RD = grouped_gemm(dh_RH, w_in.transpose(1, 2), tiles, gather=False, blocks=wide)
    dx_TD = combine(dx_RD, tiles.row_TK, torch.ones_like(gate_TK), tiles.end_E[-1:])
    dw_in_EHD = weight_gradient(dh_RH, x_TD, tiles, gather="right", dtype=w_in_EHD.dtype, blocks=wide)
    dw_out_EDF = weight_gradient(dy_TD, act_RF, tiles, gather="left", dtype=w_out_EDF.dtype, blocks=wide)
    dgate_TK = torch.where(expert_TK < w_in.shape[0], dgate_R[tiles.row_TK], 0.0).to(gate_TK.dtype)
    return dx_TD, dw_in_EHD, dw_out_EDF, dgate_TK


@_expert_ffn_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, h_RH: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(w_in_EHD), torch.empty_like(w_out_EDF), torch.empty_like(gate_TK)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy_TD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, h_RH = ctx.saved_tensors
    dx, dw_in, dw_out, dgate = _expert_ffn_backward(dy_TD, x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, h_RH, ctx.activation)
    return dx, dw_in, dw_out, None, dgate, None, None


_expert_ffn.register_autograd(_backward, setup_context=_keep)
