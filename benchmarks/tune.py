"""Search tile sizes for the layers of `benchmarks.kernels` on this CUDA device: `python -m benchmarks.tune [--shape N]… [--seconds S]`.

Writes what beat the usual tiles to kernels/tuned.json, with the date, the versions and both times; the last line is one JSON object. Every candidate
is compiled ahead first, on all cores: what spills or takes too much shared memory is never run. A layer's tiles are searched product by
product, first their sizes, then the launch order and whether programs loop over tiles, for each number of rows that they can share.
"""

# ruff: noqa: N806 - names of tensors carry their shape
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_time import Work, measure, smi
from benchmarks.kernels import TARGETS, Layer, Shape
from kernels import aot, blocks
from kernels.blocks import Blocks, Case, LayerBlocks, mean_rows, usual_layer_blocks
from kernels.experts_backward_triton import hidden_gradient, weight_gradient
from kernels.grouped_gemm_triton import grouped_gemm, make_tiles

ROWS = (64, 128)
OUTER, INNER_BYTES, WARPS, STAGES, GROUPS = (64, 128, 256), (64, 128), (4, 8), (3, 4, 5), (1, 4, 8, 16)
NAMES = {
    "up": "up", "down": "down", "hidden": "hidden_gradient", "input": "input_gradient",
    "weight_in": "weight_gradient in", "weight_out": "weight_gradient out",
}  # fmt: skip
Search = dict[str, tuple[Blocks, float]]  # product to its fastest tiles and their milliseconds


def candidates(kernel: str, rows: int, element_bytes: int) -> Iterator[Blocks]:
    """Tiles of `rows` to try, but for their launch order. A weights' gradient has no rows of a tile to share: its `rows` are of the result."""
    by_weight = kernel.startswith("weight")
    for outer, inner_bytes, warps, stages in product(OUTER, INNER_BYTES, WARPS, (5, 7) if by_weight else STAGES):
        if not by_weight or outer >= rows:
            yield Blocks(rows, outer, inner_bytes // element_bytes, warps, stages)


def loops(kernel: str, tiles: Blocks) -> list[Blocks]:
    """`tiles` with a loop over them, where the product has one; it takes more shared memory, and may need a stage less for that."""
    if kernel not in ("up", "down", "input"):
        return []
    return [replace(tiles, persistent=True, stages=stages) for stages in (tiles.stages, tiles.stages - 1) if stages > 1]


def fits(kernel: str, tiles: Blocks, *, dtype: str, capability: int, even: bool) -> bool:
    """Whether the product compiles with these tiles as `kernels.aot` wants it."""
    works = dict(aot.layer(dtype, LayerBlocks(*[tiles] * 6), "swiglu", tma=capability >= 90, even=even))
    work = works[NAMES[kernel]]
    try:
        return not aot.wrong(work, aot.compiled(work, capability), capability)
    except Exception:  # whatever stops the compiler
        return False


def products(shape: Shape, layer: Layer, up: Blocks) -> dict[str, Callable[[Blocks], Work]]:
    """Each product of the layer, for any tiles with as many rows as `up`, which makes what the others start from."""
    x_TD, w_in, w_out = (tensor.detach() for tensor in (layer.x_TD, layer.w_in_EHD, layer.w_out_EDF))
    with torch.no_grad():
        expert_TK, gate_TK = layer.route()
    tiles = make_tiles(expert_TK, shape.experts, up.rows)
    h_RH = x_TD.new_empty(len(tiles.token_R), w_in.shape[1])
    act_RF: Tensor = grouped_gemm(x_TD, w_in, tiles, gather=True, activation="swiglu", kept=h_RH, blocks=up)
    return {
        "up": lambda of: partial(grouped_gemm, x_TD, w_in, tiles, gather=True, activation="swiglu", kept=h_RH, blocks=of),
        "down": lambda of: partial(grouped_gemm, act_RF, w_out, tiles, gather=False, blocks=of),
        "hidden": lambda of: partial(hidden_gradient, x_TD, w_out, h_RH, gate_TK, tiles, "swiglu", of),
        "input": lambda of: partial(grouped_gemm, h_RH, w_in.transpose(1, 2), tiles, gather=False, blocks=of),
        "weight_in": lambda of: partial(weight_gradient, h_RH, x_TD, tiles, gather="right", dtype=x_TD.dtype, blocks=of),
        "weight_out": lambda of: partial(weight_gradient, x_TD, act_RF, tiles, gather="left", dtype=x_TD.dtype, blocks=of),
    }


def fastest(make: Callable[[Blocks], Work], tried: Iterable[Blocks], until: float) -> tuple[Blocks, float] | None:
    """The quickest of the tiles and its milliseconds, None where none runs."""
    by_name = {str(i): tiles for i, tiles in enumerate(tried)}
    rows = measure({name: (make(tiles), 0) for name, tiles in by_name.items()}, until, rounds=10)
    times = {name: row["median_ms"] for name, row in rows.items() if "error" not in row}
    best = min(times, key=times.__getitem__, default=None)
    return None if best is None else (by_name[best], times[best])


def search(shape: Shape, layer: Layer, usual: LayerBlocks, capability: int, pool: Executor, until: float) -> tuple[Search, Search]:
    """The usual tiles and the fastest ones found, each with their times: those of one number of rows, that whose products take least together."""
    even = all(width % 256 == 0 for width in (shape.width, shape.expert_width))
    able = partial(fits, dtype="bf16", capability=capability, even=even)
    base: Search = {}
    for kernel, make in products(shape, layer, usual.up).items():
        found = fastest(make, [getattr(usual, kernel)], until)
        if found is None:
            raise RuntimeError(f"the usual tiles of {kernel} do not run for {shape}")
        base[kernel] = found
    best = base
    for rows in ROWS:
        chosen: Search = {}
        for kernel, make in products(shape, layer, replace(usual.up, rows=rows)).items():
            if time.monotonic() > until:
                return base, best
            sizes = list(candidates(kernel, rows, 2))
            tried = [tiles for tiles, fit in zip(sizes, pool.map(partial(able, kernel), sizes), strict=True) if fit]
            found = fastest(make, tried, until)
            if found is None:
                break
            others = [tiles for tiles in loops(kernel, found[0]) if able(kernel, tiles)]
            orders = fastest(make, [replace(tiles, group=group) for tiles in (found[0], *others) for group in GROUPS], until)
            chosen[kernel] = min(filter(None, (found, orders)), key=lambda pair: pair[1])
        if len(chosen) == len(base) and _total(chosen) < _total(best):
            best = chosen
    return base, best


def _total(of: Search) -> float:
    return sum(milliseconds for _, milliseconds in of.values())


def entry(shape: Shape, base: Search, best: Search, capability: int) -> dict[str, Any]:
    """What `kernels.blocks.tuned` reads. A product that was no quicker than with the usual tiles keeps those, if rows allow."""
    rows = {best[kernel][0].rows for kernel in ("up", "down", "hidden", "input")}
    kept = {
        kernel: base[kernel] if base[kernel][1] <= found[1] and (kernel.startswith("weight") or rows == {base[kernel][0].rows}) else found
        for kernel, found in best.items()
    }
    case = Case(torch.cuda.get_device_name(), "bfloat16", True, shape.width, shape.expert_width, mean_rows(shape.tokens * shape.top_k, shape.experts))
    versions = {"torch": torch.__version__, "triton": version("triton"), "driver": smi("driver_version")["driver_version"]}
    return {
        **case._asdict(),
        "capability": capability,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions,
        "microseconds": {kernel: [round(1000 * found[1], 1), round(1000 * base[kernel][1], 1)] for kernel, found in kept.items()},
        "blocks": {kernel: asdict(found[0]) for kernel, found in kept.items()},
    }


def main(argv: list[str]) -> dict[str, Any]:
    """Search for each shape; the entries that were written."""
    shapes = list(TARGETS)
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description="Search tile sizes on this CUDA device.")
    parser.add_argument("--shape", type=int, action="append", choices=range(len(shapes)), help="; ".join(map(str, shapes)))
    parser.add_argument("--seconds", type=float, default=1500.0, help="after so long no new search begins")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device: tiles are searched on the device that they are for.")
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    if capability not in aot.DEVICES:
        raise SystemExit(f"sm_{capability} is not one of those that kernels.aot compiles for: {', '.join(f'sm_{known}' for known in aot.DEVICES)}.")
    wanted = [shapes[i] for i in options.shape] if options.shape else shapes
    end, written = time.monotonic() + options.seconds, []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:  # a fork would share this process's CUDA context
        for left, shape in zip(range(len(wanted), 0, -1), wanted, strict=True):
            torch.manual_seed(0)
            layer = Layer.random(shape, "cuda")
            usual = usual_layer_blocks(major, 2, gated=True, width=shape.width, expert_width=shape.expert_width)
            now = time.monotonic()
            base, best = search(shape, layer, usual, capability, pool, now + (end - now) / left)
            if best is not base:
                written.append(entry(shape, base, best, capability))
                store(written[-1])
            print(f"{shape}: {_total(base):.3f} ms with the usual tiles, {_total(best):.3f} ms with the best", file=sys.stderr, flush=True)
    return {"entries": written}


def store(new: dict[str, Any]) -> None:
    """`new` into the file, in the place of an older entry for the same."""
    entries = json.loads(blocks.TUNED.read_text())["entries"]
    others = [old for old in entries if any(old[name] != new[name] for name in Case._fields)]
    entries = sorted([*others, new], key=lambda one: [str(one[name]) for name in Case._fields])
    blocks.TUNED.write_text(json.dumps({"entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
