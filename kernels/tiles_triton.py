"""The sorting of assignments by expert, and the map from tile to expert, in Triton. Nothing here waits for the device.

A counting sort: histograms of blocks of assignments, one sum over all of them in the order of experts and then blocks, which says where each
block's rows of each expert begin, and within a block the rank among equals. So it is stable, and needs neither keys nor passes
by digit. The twin is `grouped_gemm_triton.make_tiles`.

Letters: T tokens, K experts chosen per token, E experts, R = T * K assignments, N blocks of them, M tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_gemm_triton import Tiles

BLOCK = 256
PART = 32  # of a block, compared with all of it at once


@triton.jit
def _count(expert, count, n_rows, n_blocks, N_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """count[e, n]: assignments of expert e in block n. What lies beyond the last counts as dropped, after everything else."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(expert + row, mask=row < n_rows, other=N_EXPERTS).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(count + bins * n_blocks + block, tl.histogram(chosen, BINS), mask=bins <= N_EXPERTS)


@triton.jit
def _place(
    expert, total, token, slot, row_out, n_rows, n_blocks,
    TOP_K: tl.constexpr, N_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The row of every assignment of one block, both ways; `total` is the running sum of `_count`."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    at = block * BLOCK + place
    fits = at < n_rows
    chosen = tl.load(expert + at, mask=fits, other=N_EXPERTS).to(tl.int32)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, BLOCK, PART):
        before = start + tl.arange(0, PART)
        other = tl.load(expert + block * BLOCK + before, mask=block * BLOCK + before < n_rows, other=N_EXPERTS).to(tl.int32)
        # Summed down a column, which one thread holds: no exchange between threads.
        rank += tl.sum(((chosen[None, :] == other[:, None]) & (before[:, None] < place[None, :])).to(tl.int32), 0)
    cell = chosen * n_blocks + block
    row = tl.load(total + cell - 1, mask=fits & (cell > 0), other=0) + rank
    tl.store(token + row, at // TOP_K, mask=fits)
    tl.store(slot + row, at, mask=fits)
    tl.store(row_out + at, row.to(tl.int64), mask=fits)


@triton.jit
def _map(
    total, end_out, tile_expert, tile_start, used, n_blocks, n_tiles,
    TILE_ROWS: tl.constexpr, N_EXPERTS: tl.constexpr, BINS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The tiles of one expert; the last program marks those without work."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    end = tl.load(total + (bins + 1) * n_blocks - 1, mask=bins < N_EXPERTS, other=0)
    begin = tl.load(total + bins * n_blocks - 1, mask=(bins > 0) & (bins < N_EXPERTS), other=0)
    tiles = (end - begin + TILE_ROWS - 1) // TILE_ROWS
    first = tl.sum(tl.where(bins < expert, tiles, 0), 0)
    start = tl.sum(tl.where(bins == expert, begin, 0), 0)
    stop = tl.where(expert < N_EXPERTS, first + tl.sum(tl.where(bins == expert, tiles, 0), 0), n_tiles)
    if expert < N_EXPERTS:
        tl.store(end_out + expert, tl.sum(tl.where(bins == expert, end, 0), 0))
    else:
        tl.store(used, first)
    for tile in range(first, stop, PART):
        at = tile + tl.arange(0, PART)
        tl.store(tile_expert + at, tl.zeros((PART,), dtype=tl.int32) + expert, mask=at < stop)
        tl.store(tile_start + at, start + (at - first) * TILE_ROWS, mask=at < stop)


def make_tiles(expert_TK: Tensor, n_experts: int, block_rows: int) -> Tiles:
    """As `grouped_gemm_triton.make_tiles`, but that `start_M` of tiles without work may differ; entries are at most E."""
    n_rows = expert_TK.numel()
    n_blocks, n_tiles = triton.cdiv(n_rows, BLOCK), triton.cdiv(n_rows, block_rows) + min(n_experts, n_rows)

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=expert_TK.device)

    tiles = Tiles(
        token_R=empty(n_rows), slot_R=empty(n_rows), row_TK=empty(*expert_TK.shape, dtype=torch.int64),
        end_E=empty(n_experts), expert_M=empty(n_tiles), start_M=empty(n_tiles), used_1=empty(1),
    )  # fmt: skip
    if n_rows == 0:
        tiles.end_E.zero_()
        tiles.used_1.zero_()
        return tiles
    expert_TK, bins = expert_TK.contiguous(), triton.next_power_of_2(n_experts + 1)
    count_EN = empty(n_experts + 1, n_blocks)
    _count[(n_blocks,)](expert_TK, count_EN, n_rows, n_blocks, N_EXPERTS=n_experts, BINS=bins, BLOCK=BLOCK)
    total = count_EN.flatten().cumsum(0, dtype=torch.int32)
    _place[(n_blocks,)](
        expert_TK, total, tiles.token_R, tiles.slot_R, tiles.row_TK, n_rows, n_blocks,
        TOP_K=expert_TK.shape[1], N_EXPERTS=n_experts, BLOCK=BLOCK, PART=PART,
    )  # fmt: skip
    _map[(n_experts + 1,)](
        total, tiles.end_E, tiles.expert_M, tiles.start_M, tiles.used_1, n_blocks, n_tiles,
        TILE_ROWS=block_rows, N_EXPERTS=n_experts, BINS=bins, PART=BLOCK,
    )  # fmt: skip
    return tiles
