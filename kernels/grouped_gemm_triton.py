"""Grouped matrix products in Triton: each expert's rows times its matrix, in one launch, without asking the device for counts.

Rows are gathered while they are loaded (no permuted copy in memory) and the activation may be applied before the result is stored. The
grid is the most tiles that any routing of R assignments could need; a map from tile to expert, made on the device, says which
ones have work. Sources: ScatterMoE (Tan 2024) for gathering, SonicMoE (2025) for the order of what matters.

Letters: T tokens, K experts chosen per token, E experts, R = T * K assignments sorted by expert, A inner and B outer width,
M tiles of BLOCK_ROWS rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import GATED
from kernels.activation_triton import value


@dataclass(frozen=True)
class Tiles:
    """A sorting of assignments by expert, as device tensors (int32 unless said).

    `token_R` row to token, `slot_R` row to flat assignment t * K + k, `row_TK` (int64) assignment to row, `end_E` the row after each
    expert's last, `expert_M` tile to expert (E: no work), `start_M` tile to its first row. Dropped assignments
    (expert E) take the rows from end_E[-1] on, which no tile covers.
    """

    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor
    end_E: Tensor
    expert_M: Tensor
    start_M: Tensor


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
    return Tiles((slot_R // expert_TK.shape[1]).int(), slot_R.int(), row_TK.view_as(expert_TK), end_E.int(), expert_M.int(), start_M.int())


@triton.jit
def _grouped_gemm(
    a, w, out, kept, token, end, tile_expert, tile_start,
    n_inner, n_outer, stride_a, stride_we, stride_wb, stride_wa, stride_out, stride_kept,
    N_EXPERTS: tl.constexpr, GATHER: tl.constexpr, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    KEEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """out[r, b] = act(sum_a rows[r, a] w[e, b, a]); if gated w has 2 * n_outer rows. KEEP also stores what the activation was given."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < N_EXPERTS:
        row = tl.load(tile_start + tile) + tl.arange(0, BLOCK_ROWS)
        row_fits = row < tl.load(end + expert)
        source = row
        if GATHER:
            source = tl.load(token + row, mask=row_fits, other=0)
        outer = tl.program_id(1) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)
        outer_fits = (outer < n_outer) | EVEN
        inner = tl.arange(0, BLOCK_INNER)
        a_at = a + source.to(tl.int64)[:, None] * stride_a + inner[None, :]
        w_at = w + expert.to(tl.int64) * stride_we + outer[None, :] * stride_wb + inner[:, None] * stride_wa
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        second = tl.zeros((BLOCK_ROWS, BLOCK_OUTER), dtype=tl.float32)
        for start in range(0, n_inner, BLOCK_INNER):
            inner_fits = (inner < n_inner - start) | EVEN
            rows = tl.load(a_at, mask=row_fits[:, None] & inner_fits[None, :], other=0.0)
            weights = tl.load(w_at, mask=inner_fits[:, None] & outer_fits[None, :], other=0.0)
            total = tl.dot(rows, weights, total, input_precision=PRECISION)
            if IS_GATED:
                weights = tl.load(w_at + n_outer * stride_wb, mask=inner_fits[:, None] & outer_fits[None, :], other=0.0)
                second = tl.dot(rows, weights, second, input_precision=PRECISION)
            a_at += BLOCK_INNER
            w_at += BLOCK_INNER * stride_wa
        fits = row_fits[:, None] & outer_fits[None, :]
        if KEEP:
            first_at = kept + tl.load(tile_start + tile).to(tl.int64) * stride_kept
            kept_at = tl.arange(0, BLOCK_ROWS)[:, None] * stride_kept + outer[None, :]
            tl.store(first_at + kept_at, total.to(kept.dtype.element_ty), mask=fits)
            if IS_GATED:
                tl.store(first_at + n_outer + kept_at, second.to(kept.dtype.element_ty), mask=fits)
        if ACTIVATION != "none":
            total = value(total, second, ACTIVATION)
        out_at = tl.arange(0, BLOCK_ROWS)[:, None] * stride_out + outer[None, :]
        tl.store(out + tl.load(tile_start + tile).to(tl.int64) * stride_out + out_at, total.to(out.dtype.element_ty), mask=fits)


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch parameters."""

    rows: int = 128
    outer: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 3


Kernel = Literal["plain", "gated", "gradient"]


def usual_blocks(generation: int, element_bytes: int, kernel: Kernel) -> Blocks:
    """Those of a GPU whose compute capability begins with `generation`, for elements of 2 or 4 bytes.

    A gated activation needs two sums of a tile at once. Before Hopper, 128 x 128 of each do not fit into registers together with the operands:
    3,880 bytes a thread were spilled on sm_80. With 64 float32 of the inner width at a time, its tiles need 294,912 bytes of shared
    memory on sm_90, which has 232,448. The hidden layer's gradient holds six tiles when it ends: of 128 x 128 it spills 1,496 bytes
    on sm_90. The up-projection fits because its stores go from a scalar base with
    32-bit offsets. `kernels.aot` checks all of this.
    """
    outer = 128
    if kernel == "gated" and generation < 9:
        outer = 64
    if kernel == "gradient":
        outer = 128 // element_bytes
    return Blocks(outer=outer, inner=128 // element_bytes)


def usual(a: Tensor, kernel: Kernel) -> Blocks:
    """`usual_blocks` for `a`'s device and type; without a CUDA device those of Hopper."""
    generation = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else 9
    return usual_blocks(generation, a.element_size(), kernel)


def grouped_gemm(
    a: Tensor,
    w_EBA: Tensor,
    tiles: Tiles,
    *,
    gather: bool,
    activation: str = "none",
    kept: Tensor | None = None,
    blocks: Blocks | None = None,
    precision: str = "tf32",
) -> Tensor:
    """Each expert's rows times its matrix, [R, B]; rows that belong to no expert are left unwritten.

    `a` is [T, A] with `gather`, else [R, A] in sorted order; `w_EBA` has any strides. With an `activation` (as in `kernels.activation`),
    it is applied; w is [E, 2B, A] for the gated ones, gate rows first, and `kept`, [R, rows of w], takes what it was applied to.
    Products accumulate in float32; `precision` ("tf32", "ieee") is that of float32 inputs. `tiles` must have been cut with
    blocks.rows (`Blocks().rows` without `blocks`). The twin is `grouped_gemm_naive.grouped_gemm`.
    """
    gated = activation in GATED
    blocks = blocks or usual(a, "gated" if gated else "plain")
    n_experts, n_outer, n_inner = w_EBA.shape
    n_outer = n_outer // 2 if gated else n_outer
    a = a if a.stride(-1) == 1 else a.contiguous()
    out = a.new_empty(len(tiles.token_R), n_outer)
    grid = (len(tiles.expert_M), triton.cdiv(n_outer, blocks.outer))
    if grid[0] == 0:
        return out
    _grouped_gemm[grid](
        a, w_EBA, out, out if kept is None else kept, tiles.token_R, tiles.end_E, tiles.expert_M, tiles.start_M,
        n_inner, n_outer, a.stride(0), w_EBA.stride(0), w_EBA.stride(1), w_EBA.stride(2), out.stride(0), 0 if kept is None else kept.stride(0),
        N_EXPERTS=n_experts, GATHER=gather, ACTIVATION=activation, IS_GATED=gated, KEEP=kept is not None,
        EVEN=n_inner % blocks.inner == 0 and n_outer % blocks.outer == 0, PRECISION=precision,
        BLOCK_ROWS=blocks.rows, BLOCK_OUTER=blocks.outer, BLOCK_INNER=blocks.inner,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out
