"""Tile sizes of the Triton products: those measured for a device and a shape of layer where `tuned.json` has them, else the usual ones.

`python -m benchmarks.tune` measures and writes the entries; `python -m kernels.aot` compiles every one of them. Nothing is searched for when a
run starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Blocks:
    """Tile sizes and launch parameters; `group` row tiles run next to each other for every column, so that the second-level cache serves them.

    `persistent`: as many programs as run at a time make tile after tile, for those of the products that can (`grouped_gemm_triton`).
    """

    rows: int = 128
    outer: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8
    persistent: bool = False


Kernel = Literal["up", "down", "hidden", "input", "weight_in", "weight_out"]


class LayerBlocks(NamedTuple):
    """Those of each product of a layer, forward (up, down) and backward; all but the weights' gradients have the same `rows`."""

    up: Blocks
    down: Blocks
    hidden: Blocks
    input: Blocks
    weight_in: Blocks
    weight_out: Blocks


SMALL = LayerBlocks(*[Blocks(rows=16, outer=16, inner=16, warps=4, stages=1, group=2)] * 6)
"""For the interpreter, which takes as long for an empty tile as for a full one."""


class Case(NamedTuple):
    """What a measurement holds for; `rows_per_expert` is the largest power of two that the mean over the experts reaches."""

    device: str
    dtype: str
    gated: bool
    width: int
    expert_width: int
    rows_per_expert: int


def usual_blocks(generation: int, element_bytes: int, kernel: Kernel, *, gated: bool, n_outer: int) -> Blocks:
    """Those of a GPU whose compute capability begins with `generation`, for elements of 2 or 4 bytes and a result `n_outer` wide.

    A gated activation needs two sums of a tile at once: where there are no 228 KiB of shared memory (before Hopper, and on small Blackwells),
    128 x 128 of each spill 3,880 bytes a thread, and in float32 32 on Blackwell. Those, and the gradient at the hidden layer in float32 or of
    widths that leave masks in, take 64 columns. float32 in three products of parts spills 376 bytes on sm_80 with 128 columns. Exact GELU
    beside 256 columns spills 152. In the weights' gradients half of the stages go to the indices of the rows: 7 keep four tiles on their
    way. `kernels.aot` checks all of this.
    """
    large, half = generation in (9, 10, 11), element_bytes == 2
    outer, stages = 128 if large or half else 64, 4 if large else 3
    if kernel == "up" and gated and not (large and half):
        outer //= 2
    elif kernel == "hidden" and not (half and n_outer % 128 == 0):
        outer = 64
    elif kernel not in ("up", "hidden") and large and half and n_outer % 256 == 0:
        outer = 256
    if kernel in ("weight_in", "weight_out") and large:
        stages = 7 if half else 5
    return Blocks(outer=outer, inner=128 // element_bytes, stages=stages)


def usual_layer_blocks(generation: int, element_bytes: int, *, gated: bool, width: int, expert_width: int) -> LayerBlocks:
    """`usual_blocks` of every product of a layer."""
    n_outer = {"up": expert_width, "down": width, "hidden": expert_width, "input": width, "weight_in": width, "weight_out": expert_width}
    found = {kernel: usual_blocks(generation, element_bytes, kernel, gated=gated, n_outer=outer) for kernel, outer in n_outer.items()}
    return LayerBlocks(**found)


def layer_blocks(x_TD: Tensor, n_experts: int, expert_width: int, n_rows: int, *, gated: bool) -> LayerBlocks:
    """What a layer runs with: on x's device and in its dtype, for `n_rows` assignments to `n_experts`."""
    if not x_TD.is_cuda:
        return SMALL
    device, dtype = torch.cuda.get_device_name(x_TD.device), str(x_TD.dtype).removeprefix("torch.")
    case = Case(device, dtype, gated, x_TD.shape[1], expert_width, mean_rows(n_rows, n_experts))
    return _chosen(case, torch.cuda.get_device_capability(x_TD.device)[0], x_TD.element_size())


def mean_rows(n_rows: int, n_experts: int) -> int:
    """The largest power of two that n_rows / n_experts reaches; at least 1."""
    return 1 << (max(1, n_rows // n_experts).bit_length() - 1)


@cache
def _chosen(case: Case, generation: int, element_bytes: int) -> LayerBlocks:
    found = {known: blocks for known, blocks, _ in tuned()}.get(case)
    return found or usual_layer_blocks(generation, element_bytes, gated=case.gated, width=case.width, expert_width=case.expert_width)


def tuned(path: Path | None = None) -> Iterator[tuple[Case, LayerBlocks, dict[str, Any]]]:
    """The measured entries: for what, with what, and the rest of the entry ("capability", "date", "versions", "microseconds").

    Raises ValueError where the tiles of one layer differ in the rows of a tile, TypeError or KeyError for a wrong or a missing name.
    """
    path = path or TUNED
    for entry in json.loads(path.read_text())["entries"]:
        case = Case(*(entry[name] for name in Case._fields))
        blocks = LayerBlocks(**{kernel: Blocks(**sizes) for kernel, sizes in entry["blocks"].items()})
        if len({blocks.up.rows, blocks.down.rows, blocks.hidden.rows, blocks.input.rows}) > 1:
            raise ValueError(f"{path.name}: the products of {case} have tiles of different rows")
        yield case, blocks, {name: value for name, value in entry.items() if name not in (*Case._fields, "blocks")}
