"""Grouped matrix products in Triton: each expert's rows times its matrix, in one launch, without asking the device for counts.

Rows are gathered while they are loaded (no permuted copy in memory) and the activation may be applied before the result is stored. The
grid is the most tiles that any routing of R assignments could need; a map from tile to expert, made on the device, says which
ones have work. Sources: ScatterMoE (Tan 2024) for gathering, SonicMoE (2025) for the order of what matters.

Letters: T tokens, K experts chosen per token, E experts, R = T * K assignments sorted by expert, A inner and B outer width,
M tiles of BLOCK_ROWS rows.
"""

# ruff: noqa: RET505 - Triton compiles only the branch of a constant condition, and only if it is written as one
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import GATED
from kernels.activation_triton import value
from kernels.blocks import Blocks, Kernel, usual_blocks
from kernels.descriptor import descriptor, weight_descriptor
from kernels.tf32_triton import nearest


@dataclass(frozen=True)
class Tiles:
    """A sorting of assignments by expert, as device tensors (int32 unless said).

    `token_R` row to token, `slot_R` row to flat assignment t * K + k, `row_TK` (int64) assignment to row, `end_E` the row after each
    expert's last, `expert_M` tile to expert (E: no work), `start_M` tile to its first row, `used_1` how many tiles have work, which are the first.
    Dropped assignments (expert E) take the rows from end_E[-1] on, which no tile covers.
    """

    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor
    end_E: Tensor
    expert_M: Tensor
    start_M: Tensor
    used_1: Tensor


def make_tiles(expert_TK: Tensor, n_experts: int, block_rows: int) -> Tiles:
    """Sort stably by expert and cut each expert's rows into tiles. Nothing here waits for the device."""
    n_rows = expert_TK.numel()
    device = expert_TK.device
    expert_R, slot_R = expert_TK.flatten().sort(stable=True)
    end_E = torch.searchsorted(expert_R, torch.arange(n_experts, device=device), right=True)
    count_E = end_E.diff(prepend=end_E.new_zeros(1))
    tile_end_E = ((count_E + (block_rows - 1)) // block_rows).cumsum(0)
    tile_M = torch.arange(-(-n_rows // block_rows) + min(n_experts, n_rows), device=device)
    expert_M = torch.searchsorted(tile_end_E, tile_M, right=True)
    at_M = expert_M.clamp_max(n_experts - 1)
    tiles_before_M = torch.where(at_M > 0, tile_end_E[at_M - 1], 0)
    start_M = (end_E - count_E)[at_M] + (tile_M - tiles_before_M) * block_rows
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(n_rows, device=device))
    row_TK, token_R, used_1 = row_TK.view_as(expert_TK), slot_R // expert_TK.shape[1], tile_end_E[-1:]
    return Tiles(token_R.int(), slot_R.int(), row_TK, end_E.int(), expert_M.int(), start_M.int(), used_1.int())


@triton.jit
def weight_tile(w, expert, outer, inner, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, INNER_LAST: tl.constexpr):
    """w[expert, outer:, inner:] through a descriptor, as [BLOCK_INNER, BLOCK_OUTER]; zeros beyond the expert's matrix."""
    if INNER_LAST:
        return w.load([expert, outer, inner]).reshape(BLOCK_OUTER, BLOCK_INNER).T
    else:
        return w.load([expert, inner, outer]).reshape(BLOCK_INNER, BLOCK_OUTER)


@triton.jit
def _tile(
    tile, column, expert, a, w, bias, out, out_tma, kept, token, end, tile_start,
    n_inner, n_outer, stride_a, stride_we, stride_wb, stride_wa, stride_out, stride_kept,
    GATHER: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, BIASED: tl.constexpr,
    KEEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS_BY_TMA: tl.constexpr, WEIGHTS_BY_TMA: tl.constexpr, OUT_BY_TMA: tl.constexpr, INNER_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """One tile of `_grouped_gemm`."""
    first = tl.load(tile_start + tile)
    last = tl.load(end + expert) - 1
    first_outer = column * BLOCK_OUTER
    outer = first_outer + tl.arange(0, BLOCK_OUTER)
    outer_fits = (outer < n_outer) | EVEN
    inner = tl.arange(0, BLOCK_INNER)
    if not ROWS_BY_TMA:
        source = tl.minimum(first + tl.arange(0, BLOCK_ROWS), last)  # what a short tile multiplies beyond its last row is not stored
        if GATHER:
            source = tl.load(token + source)
        a_at = a + source.to(tl.int64)[:, None] * stride_a + inner[None, :]
    if not WEIGHTS_BY_TMA:
        w_at = w + expert.to(tl.int64) * stride_we + outer[None, :] * stride_wb + inner[:, None] * stride_wa
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
    second = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
    for start in range(0, n_inner, BLOCK_INNER):
        inner_fits = (inner < n_inner - start) | EVEN
        if ROWS_BY_TMA:
            rows = a.load([first, start])
        else:
            rows = tl.load(a_at, mask=inner_fits[None, :], other=0.0)
            if not GATHER:
                rows = nearest(rows, PRECISION)
            a_at += BLOCK_INNER
        if WEIGHTS_BY_TMA:
            weights = weight_tile(w, expert, first_outer, start, BLOCK_OUTER, BLOCK_INNER, INNER_LAST)
        else:
            weights = nearest(tl.load(w_at, mask=inner_fits[:, None] & outer_fits[None, :], other=0.0), PRECISION)
        total = tl.dot(rows, weights, total, input_precision=PRECISION)
        if IS_GATED:
            if WEIGHTS_BY_TMA:
                weights = weight_tile(w, expert, n_outer + first_outer, start, BLOCK_OUTER, BLOCK_INNER, INNER_LAST)
            else:
                weights = tl.load(w_at + n_outer * stride_wb, mask=inner_fits[:, None] & outer_fits[None, :], other=0.0)
                weights = nearest(weights, PRECISION)
            second = tl.dot(rows, weights, second, input_precision=PRECISION)
        if not WEIGHTS_BY_TMA:
            w_at += BLOCK_INNER * stride_wa
    fits = (tl.arange(0, BLOCK_ROWS) <= last - first)[:, None] & outer_fits[None, :]
    if BIASED:
        bias_at = bias + expert * (2 * n_outer if IS_GATED else n_outer) + outer
        total += tl.load(bias_at, mask=outer_fits, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            second += tl.load(bias_at + n_outer, mask=outer_fits, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        first_at = kept + first.to(tl.int64) * stride_kept
        kept_at = tl.arange(0, BLOCK_ROWS)[:, None] * stride_kept + outer[None, :]
        tl.store(first_at + kept_at, total.to(kept.dtype.element_ty), mask=fits)
        if IS_GATED:
            tl.store(first_at + n_outer + kept_at, second.to(kept.dtype.element_ty), mask=fits)
    if ACTIVATION != "none":
        total = value(total, second, ACTIVATION)
    total = total.to(out.dtype.element_ty)
    out_at = tl.arange(0, BLOCK_ROWS)[:, None] * stride_out + outer[None, :]
    if not OUT_BY_TMA:
        tl.store(out + first.to(tl.int64) * stride_out + out_at, total, mask=fits)
    elif last - first >= BLOCK_ROWS - 1:
        out_tma.store([first, first_outer], total)
    else:
        tl.store(out + first.to(tl.int64) * stride_out + out_at, total, mask=fits)


@triton.jit
def _grouped_gemm(
    a, w, bias, out, out_tma, kept, token, end, tile_expert, tile_start, used,
    n_experts, n_tiles, n_inner, n_outer, stride_a, stride_we, stride_wb, stride_wa, stride_out, stride_kept,
    GATHER: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr, BIASED: tl.constexpr,
    KEEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS_BY_TMA: tl.constexpr, WEIGHTS_BY_TMA: tl.constexpr, OUT_BY_TMA: tl.constexpr, INNER_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """out[r, b] = act(sum_a rows[r, a] w[e, b, a] + bias[e, b]); if gated w has 2 * n_outer rows. KEEP also stores what the activation was given.

    A program makes one tile, or with PERSISTENT every so many of those that have work, loading for the next while it stores the last.
    """
    n_columns = tl.cdiv(n_outer, BLOCK_OUTER)
    if PERSISTENT:
        n_used = tl.load(used)
        for place in tl.range(tl.program_id(0), n_used * n_columns, tl.num_programs(0), flatten=True):
            tile, column = tl.swizzle2d(place // n_columns, place % n_columns, n_used, n_columns, GROUP)
            _tile(
                tile, column, tl.load(tile_expert + tile), a, w, bias, out, out_tma, kept, token, end, tile_start,
                n_inner, n_outer, stride_a, stride_we, stride_wb, stride_wa, stride_out, stride_kept,
                GATHER, ACTIVATION, IS_GATED, BIASED, KEEP, EVEN, PRECISION, ROWS_BY_TMA, WEIGHTS_BY_TMA, OUT_BY_TMA, INNER_LAST,
                BLOCK_ROWS, BLOCK_OUTER, BLOCK_INNER,
            )  # fmt: skip
    else:
        tile, column = tl.swizzle2d(tl.program_id(0) // n_columns, tl.program_id(0) % n_columns, n_tiles, n_columns, GROUP)
        expert = tl.load(tile_expert + tile)
        if expert < n_experts:
            _tile(
                tile, column, expert, a, w, bias, out, out_tma, kept, token, end, tile_start,
                n_inner, n_outer, stride_a, stride_we, stride_wb, stride_wa, stride_out, stride_kept,
                GATHER, ACTIVATION, IS_GATED, BIASED, KEEP, EVEN, PRECISION, ROWS_BY_TMA, WEIGHTS_BY_TMA, OUT_BY_TMA, INNER_LAST,
                BLOCK_ROWS, BLOCK_OUTER, BLOCK_INNER,
            )  # fmt: skip


def grouped_gemm(
    a: Tensor,
    w_EBA: Tensor,
    tiles: Tiles,
    *,
    gather: bool,
    activation: str = "none",
    bias_EB: Tensor | None = None,
    kept: Tensor | None = None,
    blocks: Blocks | None = None,
    precision: str = "tf32x3",
) -> Tensor:
    """Each expert's rows times its matrix, [R, B]; rows that belong to no expert are left unwritten.

    `a` is [T, A] with `gather`, else [R, A] in sorted order; `w_EBA` has any strides. With an `activation` (as in `kernels.activation`),
    it is applied; w is [E, 2B, A] for the gated ones, gate rows first, and `kept`, [R, rows of w], takes what it was applied to.
    `bias_EB` [E, rows of w] is added before. Products accumulate in float32; `precision` is that of float32 inputs: "tf32x3" (three products of
    parts, to about float32's own), or "tf32", for which gathered rows must have been `rounded` already. `tiles` must have been cut with blocks.rows
    (`Blocks().rows` without `blocks`). The twin is `grouped_gemm_naive.grouped_gemm`.
    """
    gated = activation in GATED
    n_experts, n_outer, n_inner = w_EBA.shape
    n_outer = n_outer // 2 if gated else n_outer
    blocks = blocks or usual(a, "up" if gather else "down", gated=gated, n_outer=n_outer)
    a = a if a.stride(-1) == 1 else a.contiguous()
    out = a.new_empty(len(tiles.token_R), n_outer)
    n_tiles, n_columns = len(tiles.expert_M), triton.cdiv(n_outer, blocks.outer)
    if n_tiles == 0:
        return out
    rows_tma = None if gather else descriptor(a, [blocks.rows, blocks.inner], precision=precision)
    w_tma = weight_descriptor(w_EBA, blocks.outer, blocks.inner, precision=precision)
    # Beside an activation it takes too many registers; and its second way, for short tiles, would keep a loop over tiles from being one.
    out_tma = descriptor(out, [blocks.rows, blocks.outer]) if activation == "none" and not blocks.persistent else None
    n_programs = min(n_tiles * n_columns, processors(a.device)) if blocks.persistent else n_tiles * n_columns
    _grouped_gemm[(n_programs,)](
        rows_tma or a, w_tma or w_EBA, bias_EB if bias_EB is None else bias_EB.contiguous(), out, out_tma, kept,
        tiles.token_R, tiles.end_E, tiles.expert_M, tiles.start_M, tiles.used_1, n_experts, n_tiles, n_inner, n_outer,
        a.stride(0), *w_EBA.stride(), out.stride(0), 0 if kept is None else kept.stride(0),
        GATHER=gather, ACTIVATION=activation, IS_GATED=gated, BIASED=bias_EB is not None, KEEP=kept is not None,
        EVEN=n_inner % blocks.inner == 0 and n_outer % blocks.outer == 0, PRECISION=precision,
        ROWS_BY_TMA=rows_tma is not None, WEIGHTS_BY_TMA=w_tma is not None, OUT_BY_TMA=out_tma is not None, INNER_LAST=w_EBA.stride(2) == 1,
        BLOCK_ROWS=blocks.rows, BLOCK_OUTER=blocks.outer, BLOCK_INNER=blocks.inner, GROUP=blocks.group,
        PERSISTENT=blocks.persistent, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


def usual(a: Tensor, kernel: Kernel, *, gated: bool, n_outer: int) -> Blocks:
    """`usual_blocks` for `a`'s device and type; without a CUDA device those of Hopper."""
    generation = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else 9
    return usual_blocks(generation, a.element_size(), kernel, gated=gated, n_outer=n_outer)


def processors(device: torch.device) -> int:
    """How many programs `device` runs at a time that fill one of its multiprocessors each; 3 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
