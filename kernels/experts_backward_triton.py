"""The backward pass of the routed feed-forward in Triton. Rows are gathered while they are loaded; no atomics, so it is deterministic.

One kernel makes, of the output's gradient, everything at the hidden layer: with A = act(H) and dA' the gradient before the gate,
the gate's gradient <dA', A>, the gated A' = gate * A that the down-projection's gradient needs, and dH. So neither the layer's
rows Y nor A are kept for it (SonicMoE 2025, section 3.2). The other makes both weight gradients.

Letters: T tokens, K experts chosen per token, E experts, R = T * K assignments sorted by expert, D width, F expert width, H = 2F
(gated) or F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import GATED
from kernels.activation_triton import slopes, value
from kernels.grouped_gemm_triton import Blocks, Tiles


@triton.jit
def _hidden_gradient(
    dy, w, hidden, gate, dhidden, act, dgate, token, slot, end, tile_expert, tile_start,
    n_inner, n_outer, n_rows, stride_dy, stride_we, stride_wa, stride_wb, stride_h, stride_act,
    N_EXPERTS: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """dA'[r, f] = sum_d dy[token_r, d] w[e, d, f], and what follows from it."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < N_EXPERTS:
        row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_ROWS)
        row_fits = row < tl.load(end + expert)
        source = tl.load(token + row, mask=row_fits, other=0)
        outer = tl.program_id(1) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
        outer_fits = outer < n_outer
        inner = tl.arange(0, BLOCK_INNER)
        dy_at = dy + source.to(tl.int64)[:, None] * stride_dy + inner[None, :]
        w_at = w + expert.to(tl.int64) * stride_we + inner[:, None] * stride_wa + outer[None, :] * stride_wb
        d = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        for start in range(0, n_inner, BLOCK_INNER):
            inner_fits = inner < n_inner - start
            rows = tl.load(dy_at, mask=row_fits[:, None] & inner_fits[None, :], other=0.0)
            weights = tl.load(w_at, mask=inner_fits[:, None] & outer_fits[None, :], other=0.0)
            d = tl.dot(rows, weights, d, input_precision=PRECISION)
            dy_at += BLOCK_INNER
            w_at += BLOCK_INNER * stride_wa
        fits = row_fits[:, None] & outer_fits[None, :]
        h_at = row.to(tl.int64)[:, None] * stride_h + outer[None, :]
        bent = tl.load(hidden + h_at, mask=fits, other=0.0).to(tl.float32)
        up = bent
        if IS_GATED:
            up = tl.load(hidden + h_at + n_outer, mask=fits, other=0.0).to(tl.float32)
        weight = tl.load(gate + tl.load(slot + row, mask=row_fits, other=0), mask=row_fits, other=0.0).to(tl.float32)
        made = value(bent, up, ACTIVATION)
        tl.store(dgate + tl.program_id(1).to(tl.int64) * n_rows + row, tl.sum(d * made, 1), mask=row_fits)
        act_at = act + row.to(tl.int64)[:, None] * stride_act + outer[None, :]
        tl.store(act_at, (made * weight[:, None]).to(act.dtype.element_ty), mask=fits)
        dbent, dup = slopes(bent, up, d * weight[:, None], ACTIVATION)
        tl.store(dhidden + h_at, dbent.to(dhidden.dtype.element_ty), mask=fits)
        if IS_GATED:
            tl.store(dhidden + h_at + n_outer, dup.to(dhidden.dtype.element_ty), mask=fits)


@triton.jit
def _weight_gradient(
    left, right, out, left_row, right_row, end,
    n_left, n_right, stride_left, stride_right, stride_oe, stride_ol,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over e's rows of left[r] right[r]^T; zero for an expert without rows."""
    expert = tl.program_id(1)
    tiles_right = tl.cdiv(n_right, BLOCK_RIGHT)
    i = (tl.program_id(0) // tiles_right) * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    j = (tl.program_id(0) % tiles_right) * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    stop = tl.load(end + expert)
    first = tl.load(end + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), dtype=tl.float32)
    for start in range(first, stop, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_fits = row < stop
        from_left, from_right = row, row
        if GATHER_LEFT:
            from_left = tl.load(left_row + row, mask=row_fits, other=0)
        if GATHER_RIGHT:
            from_right = tl.load(right_row + row, mask=row_fits, other=0)
        a = tl.load(left + from_left.to(tl.int64)[None, :] * stride_left + i[:, None], mask=row_fits[None, :] & (i < n_left)[:, None], other=0.0)
        b = tl.load(right + from_right.to(tl.int64)[:, None] * stride_right + j[None, :], mask=row_fits[:, None] & (j < n_right)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out_at = out + expert.to(tl.int64) * stride_oe + i.to(tl.int64)[:, None] * stride_ol + j[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(i < n_left)[:, None] & (j < n_right)[None, :])


def hidden_gradient(
    dy_TD: Tensor, w_out_EDF: Tensor, h_RH: Tensor, gate_TK: Tensor, tiles: Tiles, activation: str, blocks: Blocks, precision: str = "tf32"
) -> tuple[Tensor, Tensor, Tensor]:
    """dH [R, H], the gated A' [R, F] and the gates' gradients [R] (float32), all in sorted order; rows of no expert are left unwritten.

    `h_RH` is the up-projection's output. `tiles` must have been cut with blocks.rows.
    """
    n_experts, width, n_hidden = w_out_EDF.shape
    dh_RH, act_RF = torch.empty_like(h_RH), h_RH.new_empty(len(h_RH), n_hidden)
    n_outer = triton.cdiv(n_hidden, blocks.outer)
    dgate_NR = torch.empty(n_outer, len(h_RH), dtype=torch.float32, device=h_RH.device)
    dy_TD = dy_TD if dy_TD.stride(-1) == 1 else dy_TD.contiguous()
    if len(tiles.expert_M):
        _hidden_gradient[(len(tiles.expert_M), n_outer)](
            dy_TD, w_out_EDF, h_RH, gate_TK.contiguous(), dh_RH, act_RF, dgate_NR,
            tiles.token_R, tiles.slot_R, tiles.end_E, tiles.expert_M, tiles.start_M,
            width, n_hidden, len(h_RH), dy_TD.stride(0), *w_out_EDF.stride(), h_RH.stride(0), act_RF.stride(0),
            N_EXPERTS=n_experts, ACTIVATION=activation, IS_GATED=activation in GATED, PRECISION=precision,
            BLOCK_ROWS=blocks.rows, BLOCK_OUTER=blocks.outer, BLOCK_INNER=blocks.inner, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return dh_RH, act_RF, dgate_NR.sum(0)


def weight_gradient(
    left_RA: Tensor, right_RB: Tensor, tiles: Tiles, *, gather: str, dtype: torch.dtype, blocks: Blocks, precision: str = "tf32"
) -> Tensor:
    """sum over each expert's rows of left_r right_r^T, [E, A, B] in `dtype`; `gather` says which side ("left", "right") is by token."""
    n_experts, n_left, n_right = len(tiles.end_E), left_RA.shape[1], right_RB.shape[1]
    left_RA, right_RB = (side if side.stride(-1) == 1 else side.contiguous() for side in (left_RA, right_RB))
    out = torch.empty(n_experts, n_left, n_right, dtype=dtype, device=left_RA.device)
    _weight_gradient[(triton.cdiv(n_left, blocks.rows) * triton.cdiv(n_right, blocks.outer), n_experts)](
        left_RA, right_RB, out, tiles.token_R, tiles.token_R, tiles.end_E,
        n_left, n_right, left_RA.stride(0), right_RB.stride(0), out.stride(0), out.stride(1),
        GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right", PRECISION=precision,
        BLOCK_LEFT=blocks.rows, BLOCK_RIGHT=blocks.outer, BLOCK_ROWS=blocks.inner, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out
