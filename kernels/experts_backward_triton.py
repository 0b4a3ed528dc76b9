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
from kernels.blocks import Blocks
from kernels.descriptor import descriptor, weight_descriptor
from kernels.grouped_gemm_triton import Tiles, weight_tile
from kernels.tf32_triton import nearest


@triton.jit
def _bend(
    d, weight, hidden_at, dhidden_at, act_at, fits, n_outer, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
):  # fmt: skip
    """With d = dA' before the gate and the gates `weight`: stores the gated A' and dH, and gives each row's part of <dA', A>."""
    bent = tl.load(hidden_at, mask=fits, other=0.0).to(tl.float32)
    up = bent
    if IS_GATED:
        up = tl.load(hidden_at + n_outer, mask=fits, other=0.0).to(tl.float32)
    made = value(bent, up, ACTIVATION)
    tl.store(act_at, (made * weight[:, None]).to(act_at.dtype.element_ty), mask=fits)
    dbent, dup = slopes(bent, up, d * weight[:, None], ACTIVATION)
    tl.store(dhidden_at, dbent.to(dhidden_at.dtype.element_ty), mask=fits)
    if IS_GATED:
        tl.store(dhidden_at + n_outer, dup.to(dhidden_at.dtype.element_ty), mask=fits)
    return tl.sum(d * made, 1)


@triton.jit
def _hidden_gradient(
    dy, w, hidden, gate, dhidden, act, dgate, token, slot, end, tile_expert, tile_start,
    n_experts, n_tiles, n_inner, n_outer, n_rows, stride_dy, stride_we, stride_wa, stride_wb, stride_h, stride_act,
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, EVEN: tl.constexpr, EVEN_INNER: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS_BY_TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dA'[r, f] = sum_d dy[token_r, d] w[e, d, f], and what follows from it, for one half of a tile after the other to spare registers."""
    n_columns = tl.cdiv(n_outer, BLOCK_OUTER)
    tile, column = tl.swizzle2d(tl.program_id(0) // n_columns, tl.program_id(0) % n_columns, n_tiles, n_columns, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < n_experts:
        first = tl.load(tile_start + tile)
        last = tl.load(end + expert) - 1
        row = tl.minimum(first + tl.arange(0, BLOCK_ROWS), last)  # what a short tile multiplies beyond its last row is not stored
        first_outer = column * BLOCK_OUTER
        outer = first_outer + tl.arange(0, BLOCK_OUTER)
        inner = tl.arange(0, BLOCK_INNER)
        dy_at = dy + tl.load(token + row).to(tl.int64)[:, None] * stride_dy + inner[None, :]
        if not WEIGHTS_BY_TMA:
            w_at = w + expert.to(tl.int64) * stride_we + inner[:, None] * stride_wa + outer[None, :] * stride_wb
        d = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        for start in range(0, n_inner, BLOCK_INNER):
            inner_fits = (inner < n_inner - start) | EVEN_INNER
            rows = tl.load(dy_at, mask=inner_fits[None, :], other=0.0)
            if WEIGHTS_BY_TMA:
                weights = weight_tile(w, expert, first_outer, start, BLOCK_OUTER, BLOCK_INNER, False)
            else:
                weights = tl.load(w_at, mask=inner_fits[:, None] & ((outer < n_outer) | EVEN)[None, :], other=0.0)
                weights = nearest(weights, PRECISION)
                w_at += BLOCK_INNER * stride_wa
            d = tl.dot(rows, weights, d, input_precision=PRECISION)
            dy_at += BLOCK_INNER
        place = tl.arange(0, BLOCK_ROWS)
        row_fits = place <= last - first
        weight = tl.load(gate + tl.load(slot + row)).to(tl.float32)
        HALF: tl.constexpr = BLOCK_OUTER // 2
        part = tl.arange(0, HALF)
        h_part, act_part = place[:, None] * stride_h + part[None, :], place[:, None] * stride_act + part[None, :]
        hidden += first.to(tl.int64) * stride_h + first_outer
        dhidden += first.to(tl.int64) * stride_h + first_outer
        act += first.to(tl.int64) * stride_act + first_outer
        d0, d1 = d.reshape(BLOCK_ROWS, 2, HALF).permute(0, 2, 1).split()
        fits = row_fits[:, None] & ((first_outer + part < n_outer) | EVEN)[None, :]
        share = _bend(d0, weight, hidden + h_part, dhidden + h_part, act + act_part, fits, n_outer, ACTIVATION, IS_GATED)
        fits = row_fits[:, None] & ((first_outer + HALF + part < n_outer) | EVEN)[None, :]
        share += _bend(d1, weight, hidden + HALF + h_part, dhidden + HALF + h_part, act + HALF + act_part, fits, n_outer, ACTIVATION, IS_GATED)
        tl.store(dgate + column.to(tl.int64) * n_rows + first + place, share, mask=row_fits)


@triton.jit
def _rows(side, row, row_fits, token, column, column_fits, stride, GATHER: tl.constexpr, PRECISION: tl.constexpr):
    """side[row, column], or side[token[row], column] with GATHER; zeros for what does not fit."""
    source = row
    if GATHER:
        source = tl.load(token + row, mask=row_fits, other=0)
    fits = row_fits[:, None] & column_fits[None, :]
    loaded = tl.load(side + source.to(tl.int64)[:, None] * stride + column[None, :], mask=fits, other=0.0)
    return loaded if GATHER else nearest(loaded, PRECISION)


@triton.jit
def _weight_gradient(
    left, right, out, left_tma, right_tma, out_tma, token, end,
    n_left, n_right, stride_left, stride_right, stride_oe, stride_ol,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    LEFT_BY_TMA: tl.constexpr, RIGHT_BY_TMA: tl.constexpr, OUT_BY_TMA: tl.constexpr,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over e's rows of left[r] right[r]^T; zero for an expert without rows."""
    expert = tl.program_id(1)
    tiles_left, tiles_right = tl.cdiv(n_left, BLOCK_LEFT), tl.cdiv(n_right, BLOCK_RIGHT)
    tile_left, tile_right = tl.swizzle2d(tl.program_id(0) // tiles_right, tl.program_id(0) % tiles_right, tiles_left, tiles_right, GROUP)
    i = tile_left * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    j = tile_right * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    i_fits, j_fits = (i < n_left) | EVEN, (j < n_right) | EVEN
    stop = tl.load(end + expert)
    first = tl.load(end + expert - 1, mask=expert > 0, other=0)
    whole = first + (stop - first) // BLOCK_ROWS * BLOCK_ROWS
    every = tl.full((BLOCK_ROWS,), 1, tl.int1)
    total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), dtype=tl.float32)
    for start in range(first, whole, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        if LEFT_BY_TMA:
            a = left_tma.load([start, tile_left * BLOCK_LEFT])
        else:
            a = _rows(left, row, every, token, i, i_fits, stride_left, GATHER_LEFT, PRECISION)
        if RIGHT_BY_TMA:
            b = right_tma.load([start, tile_right * BLOCK_RIGHT])
        else:
            b = _rows(right, row, every, token, j, j_fits, stride_right, GATHER_RIGHT, PRECISION)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    if whole < stop:  # by pointers: rows of the next expert, or of none, must not be read
        row = whole + tl.arange(0, BLOCK_ROWS)
        a = _rows(left, row, row < stop, token, i, i_fits, stride_left, GATHER_LEFT, PRECISION)
        b = _rows(right, row, row < stop, token, j, j_fits, stride_right, GATHER_RIGHT, PRECISION)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    if OUT_BY_TMA:
        out_tma.store([expert, tile_left * BLOCK_LEFT, tile_right * BLOCK_RIGHT], total.to(out.dtype.element_ty)[None, :, :])
    else:
        out_at = out + expert.to(tl.int64) * stride_oe + i.to(tl.int64)[:, None] * stride_ol + j[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=i_fits[:, None] & j_fits[None, :])


@triton.jit
def _row_sum(rows, out, end, width, stride, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[e] = sum over e's rows, in their order; zero for an expert without rows."""
    expert = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stop = tl.load(end + expert)
    first = tl.load(end + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, stop, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        fits = (row < stop)[:, None] & (column < width)[None, :]
        total += tl.sum(tl.load(rows + row.to(tl.int64)[:, None] * stride + column[None, :], mask=fits, other=0.0).to(tl.float32), 0)
    tl.store(out + expert.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=column < width)


def hidden_gradient(
    dy_TD: Tensor, w_out_EDF: Tensor, h_RH: Tensor, gate_TK: Tensor, tiles: Tiles, activation: str, blocks: Blocks, precision: str = "tf32x3"
) -> tuple[Tensor, Tensor, Tensor]:
    """dH [R, H], the gated A' [R, F] and the gates' gradients [R] (float32), all in sorted order; rows of no expert are left unwritten.

    `h_RH` is the up-projection's output. `tiles` must have been cut with blocks.rows.
    """
    n_experts, width, n_hidden = w_out_EDF.shape
    dh_RH, act_RF = torch.empty_like(h_RH), h_RH.new_empty(len(h_RH), n_hidden)
    n_tiles, n_columns = len(tiles.expert_M), triton.cdiv(n_hidden, blocks.outer)
    dgate_NR = torch.empty(n_columns, len(h_RH), dtype=torch.float32, device=h_RH.device)
    dy_TD = dy_TD if dy_TD.stride(-1) == 1 else dy_TD.contiguous()
    w_tma = weight_descriptor(w_out_EDF.transpose(1, 2), blocks.outer, blocks.inner, precision=precision) if w_out_EDF.stride(2) == 1 else None
    if n_tiles:
        _hidden_gradient[(n_tiles * n_columns,)](
            dy_TD, w_tma or w_out_EDF, h_RH, gate_TK.contiguous(), dh_RH, act_RF, dgate_NR,
            tiles.token_R, tiles.slot_R, tiles.end_E, tiles.expert_M, tiles.start_M,
            n_experts, n_tiles, width, n_hidden, len(h_RH), dy_TD.stride(0), *w_out_EDF.stride(), h_RH.stride(0), act_RF.stride(0),
            ACTIVATION=activation, IS_GATED=activation in GATED, PRECISION=precision, WEIGHTS_BY_TMA=w_tma is not None,
            EVEN=n_hidden % blocks.outer == 0, EVEN_INNER=width % blocks.inner == 0,
            BLOCK_ROWS=blocks.rows, BLOCK_OUTER=blocks.outer, BLOCK_INNER=blocks.inner, GROUP=blocks.group,
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return dh_RH, act_RF, dgate_NR.sum(0)


def weight_gradient(
    left_RA: Tensor, right_RB: Tensor, tiles: Tiles, *, gather: str, dtype: torch.dtype, blocks: Blocks, precision: str = "tf32x3"
) -> Tensor:
    """sum over each expert's rows of left_r right_r^T, [E, A, B] in `dtype`; `gather` says which side ("left", "right") is by token.

    `blocks` are a tile of the result, rows x outer, and how many assignments are added at a time (inner).
    """
    n_experts, n_left, n_right = len(tiles.end_E), left_RA.shape[1], right_RB.shape[1]
    left_RA, right_RB = (side if side.stride(-1) == 1 else side.contiguous() for side in (left_RA, right_RB))
    out = torch.empty(n_experts, n_left, n_right, dtype=dtype, device=left_RA.device)
    left_tma = None if gather == "left" else descriptor(left_RA, [blocks.inner, blocks.rows], precision=precision)
    right_tma = None if gather == "right" else descriptor(right_RB, [blocks.inner, blocks.outer], precision=precision)
    out_tma = descriptor(out, [1, blocks.rows, blocks.outer])
    _weight_gradient[(triton.cdiv(n_left, blocks.rows) * triton.cdiv(n_right, blocks.outer), n_experts)](
        left_RA, right_RB, out, left_tma, right_tma, out_tma, tiles.token_R, tiles.end_E,
        n_left, n_right, left_RA.stride(0), right_RB.stride(0), out.stride(0), out.stride(1),
        GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right", PRECISION=precision,
        LEFT_BY_TMA=left_tma is not None, RIGHT_BY_TMA=right_tma is not None, OUT_BY_TMA=out_tma is not None,
        EVEN=n_left % blocks.rows == 0 and n_right % blocks.outer == 0,
        BLOCK_LEFT=blocks.rows, BLOCK_RIGHT=blocks.outer, BLOCK_ROWS=blocks.inner, GROUP=blocks.group,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


def row_sum(rows_RA: Tensor, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """The sum over each expert's rows, added in float32 in a fixed order; [E, A] in `dtype`. The gradient of biases."""
    n_experts, width = len(tiles.end_E), rows_RA.shape[1]
    out = torch.empty(n_experts, width, dtype=dtype, device=rows_RA.device)
    _row_sum[(triton.cdiv(width, 128), n_experts)](rows_RA, out, tiles.end_E, width, rows_RA.stride(0), BLOCK_ROWS=32, BLOCK=128, num_warps=4)
    return out
