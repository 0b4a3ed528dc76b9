"""Compile the Triton kernels for GPUs that are not here: `python -m kernels.aot`. The last line is one JSON object.

Also those of every entry of `tuned.json`. Fails (exit 1) where a kernel does not compile, needs more shared memory than the device has, spills
registers, does not use the matrix units, or does not move by the copy engine what it should. Instructions are counted in the PTX and again in the
machine code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from kernels import aot_routing
from kernels.activation import GATED
from kernels.blocks import Blocks, LayerBlocks, tuned, usual_layer_blocks
from kernels.combine_triton import _combine
from kernels.experts_backward_triton import _hidden_gradient, _row_sum, _weight_gradient
from kernels.grouped_gemm_triton import _grouped_gemm
from kernels.tf32_triton import _round

# compute capability: shared memory of one block in bytes, the instruction that its matrix units run
DEVICES = {80: (166_912, "mma.sync"), 90: (232_448, "wgmma.mma_async"), 100: (232_448, "tcgen05.mma")}
TYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4)}
INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "UTMALDG", "UTMASTG", "LDGSTS")


@dataclass(frozen=True)
class Work:
    """A kernel to compile: with which launch parameters, whether it multiplies, whether it loads through descriptors, and gathers beside them."""

    source: ASTSource
    blocks: Blocks
    multiplies: bool = False
    descriptors: bool = False
    gathers: bool = False


def source(kernel: Any, dtype: str, constants: dict[str, Any], descriptors: dict[str, list[int]] | None = None) -> ASTSource:
    """A kernel of the layer for aligned tensors: pointers by their names, descriptors by the tiles they are of, the rest 32-bit integers."""
    tiles = descriptors or {}
    indices = ("token", "slot", "end", "tile_expert", "tile_start", "used")
    pointers = dict.fromkeys(("a", "w", "out", "kept", "bias", "dy", "hidden", "dhidden", "act", "left", "right", "rows"), f"*{dtype}")
    pointers |= dict.fromkeys(indices, "*i32") | {"gate": "*fp32", "dgate": "*fp32"}
    pointers |= {name: f"tensordesc<{dtype}[{', '.join(map(str, block))}]>" for name, block in tiles.items()}
    constants = constants | {name: None for name in kernel.arg_names if name.endswith("_tma") and name not in tiles}
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    plain = [i for i, name in enumerate(kernel.arg_names) if name not in constants and name not in tiles]
    return ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in plain})


def product(
    dtype: str,
    blocks: Blocks,
    *,
    tma: bool,
    even: bool,
    gather: bool,
    activation: str = "none",
    keep: bool = False,
    biased: bool = False,
    last: bool = True,
    precision: str = "tf32",
) -> Work:
    """A grouped product; `last`: the weights' inner dimension is their contiguous one."""
    constants = {
        "GATHER": gather, "ACTIVATION": activation, "IS_GATED": activation in GATED, "BIASED": biased, "KEEP": keep, "EVEN": even,
        "ROWS_BY_TMA": tma and not gather, "WEIGHTS_BY_TMA": tma, "OUT_BY_TMA": tma and activation == "none" and not blocks.persistent,
        "PRECISION": precision, "INNER_LAST": last, "stride_wa" if last else "stride_wb": 1,
        "BLOCK_ROWS": blocks.rows, "BLOCK_OUTER": blocks.outer, "BLOCK_INNER": blocks.inner, "GROUP": blocks.group, "PERSISTENT": blocks.persistent,
    }  # fmt: skip
    constants |= {} if keep else {"kept": None}
    constants |= {} if biased else {"bias": None}
    descriptors = {"w": [1, blocks.outer, blocks.inner] if last else [1, blocks.inner, blocks.outer]}
    descriptors |= {} if gather else {"a": [blocks.rows, blocks.inner]}
    descriptors |= {"out_tma": [blocks.rows, blocks.outer]} if constants["OUT_BY_TMA"] else {}
    return Work(source(_grouped_gemm, dtype, constants, descriptors if tma else None), blocks, True, tma, gather)


def hidden_gradient(dtype: str, blocks: Blocks, *, tma: bool, even: bool, activation: str, precision: str = "tf32") -> Work:
    """The gradient at the hidden layer."""
    constants = {
        "ACTIVATION": activation, "IS_GATED": activation in GATED, "EVEN": even, "EVEN_INNER": even, "PRECISION": precision, "WEIGHTS_BY_TMA": tma,
        "stride_wb": 1,        "BLOCK_ROWS": blocks.rows, "BLOCK_OUTER": blocks.outer, "BLOCK_INNER": blocks.inner, "GROUP": blocks.group,
    }  # fmt: skip
    return Work(source(_hidden_gradient, dtype, constants, {"w": [1, blocks.inner, blocks.outer]} if tma else None), blocks, True, tma, True)


def weight_gradient(dtype: str, blocks: Blocks, *, tma: bool, even: bool, gather: str, precision: str = "tf32") -> Work:
    """A gradient of weights, with rows gathered on one side."""
    constants = {
        "GATHER_LEFT": gather == "left", "GATHER_RIGHT": gather == "right", "EVEN": even, "PRECISION": precision,
        "LEFT_BY_TMA": tma and gather == "right", "RIGHT_BY_TMA": tma and gather == "left", "OUT_BY_TMA": tma,
        "BLOCK_LEFT": blocks.rows, "BLOCK_RIGHT": blocks.outer, "BLOCK_ROWS": blocks.inner, "GROUP": blocks.group,
    }  # fmt: skip
    side = {"right_tma": [blocks.inner, blocks.outer]} if gather == "left" else {"left_tma": [blocks.inner, blocks.rows]}
    return Work(
        source(_weight_gradient, dtype, constants, side | {"out_tma": [1, blocks.rows, blocks.outer]} if tma else None), blocks, True, tma, True
    )


def layer(
    dtype: str,
    blocks: LayerBlocks,
    activation: str,
    *,
    tma: bool,
    even: bool = True,
    keep: bool = True,
    biased: bool = False,
    precision: str = "tf32",
) -> Iterator[tuple[str, Work]]:
    """Every product of a layer, forward and backward."""
    given: dict[str, Any] = {"tma": tma, "even": even, "precision": precision}
    yield "up", product(dtype, blocks.up, gather=True, activation=activation, keep=keep, biased=biased, **given)
    yield "down", product(dtype, blocks.down, gather=False, **given)
    yield "input_gradient", product(dtype, blocks.input, gather=False, last=False, **given)
    yield "hidden_gradient", hidden_gradient(dtype, blocks.hidden, activation=activation, **given)
    yield "weight_gradient in", weight_gradient(dtype, blocks.weight_in, gather="right", **given)
    yield "weight_gradient out", weight_gradient(dtype, blocks.weight_out, gather="left", **given)


LOOPED = ("up", "down", "input_gradient")
ALL = ("up", "down", "input_gradient", "hidden_gradient", "weight_gradient in", "weight_gradient out")
# What the layer is compiled as, its type, its activation, with biases, the width of both sides, without descriptors, and which of the products.
LAYERS: tuple[tuple[str, str, str, bool, int, bool, tuple[str, ...]], ...] = (
    ("", "bfloat16", "swiglu", False, 2048, False, ALL),
    (" geglu, biased", "bfloat16", "geglu", True, 2048, False, ("up", "hidden_gradient")),
    (" gelu, biased", "bfloat16", "gelu", True, 2048, False, ("up", "hidden_gradient")),
    (" odd", "bfloat16", "geglu", True, 1912, False, ("up", "hidden_gradient", "weight_gradient in")),
    (" by pointers", "bfloat16", "geglu", True, 1911, True, ("up", "input_gradient", "hidden_gradient", "weight_gradient out")),
    (" float16", "float16", "swiglu", False, 2048, False, ("up", "hidden_gradient")),
    (" float32", "float32", "geglu", True, 2048, False, ALL),
    (" float32, tf32x3", "float32", "geglu", True, 2048, False, ("up", "down", "hidden_gradient", "weight_gradient in")),
)


def works(capability: int) -> Iterator[tuple[str, Work]]:
    """All that is compiled for one device: LAYERS with the usual tiles, evaluation (which keeps nothing), and the layers of the measured tiles."""
    small = Blocks(warps=4)
    yield "combine", Work(combine_source("bf16"), small)
    round_types = {"x": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    yield "round to tf32", Work(ASTSource(_round, round_types, {"BLOCK": 1024}, {}), small)
    yield "row_sum", Work(source(_row_sum, "bf16", {"BLOCK_ROWS": 32, "BLOCK": 128}), small)
    for name, routing, warps in aot_routing.works():
        yield name, Work(routing, Blocks(warps=warps, stages=3))
    for suffix, name, activation, biased, width, pointers, wanted in LAYERS:
        dtype, element_bytes = TYPES[name]
        blocks = usual_layer_blocks(capability // 10, element_bytes, gated=activation in GATED, width=width, expert_width=width)
        tma = capability >= 90 and not pointers
        precision = "tf32x3" if suffix.endswith("tf32x3") else "tf32"
        for kernel, work in layer(dtype, blocks, activation, tma=tma, even=width == 2048, biased=biased, precision=precision):
            if kernel in wanted:
                yield kernel + suffix, work
        if not suffix:
            yield "up, evaluation", next(layer(dtype, blocks, activation, tma=tma, keep=False))[1]
            looped = LayerBlocks(*(replace(of, persistent=True) for of in blocks))
            yield from ((f"{kernel}, persistent", work) for kernel, work in layer(dtype, looped, activation, tma=tma) if kernel in LOOPED)
    for case, blocks, entry in tuned():
        if entry["capability"] == capability:
            even = all(width % 256 == 0 for width in (case.width, case.expert_width))
            activation = "swiglu" if case.gated else "gelu"
            for kernel, work in layer(TYPES[case.dtype][0], blocks, activation, tma=capability >= 90, even=even):
                yield f"{kernel}, {tuple(case)}", work


def combine_source(dtype: str) -> ASTSource:
    """The gather-and-sum of eight rows a token."""
    constants = {"K": 8, "BLOCK": 1024}
    types = {"y": f"*{dtype}", "row": "*i64", "gate": "*fp32", "end": "*i32", "out": f"*{dtype}", "width": "i32", "stride_y": "i32"}
    return ASTSource(_combine, {**types, "K": "constexpr", "BLOCK": "constexpr"}, constants, {})


def machine_code(cubin: bytes) -> dict[str, Any]:
    """Registers per thread, bytes of stack per thread (registers that were spilled lie there), and how often each of INSTRUCTIONS occurs."""
    programs = Path(triton.backends.nvidia.__file__).with_name("bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([programs / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([programs / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise ValueError(f"cuobjdump reports no registers: {listing[:200]!r}")
    counts = Counter(re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", sass))
    return {"registers": int(found[1]), "stack_bytes": int(found[2]), "sass": dict(sorted(counts.items()))}


def compiled(work: Work, capability: int) -> dict[str, Any]:
    """What the compiler made of it: shared memory, instructions of the PTX (matrix, copies by the engine, copies by the threads), machine code."""
    options = {"num_warps": work.blocks.warps, "num_stages": work.blocks.stages}
    kernel = compile_kernel(work.source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    return {
        "shared_bytes": kernel.metadata.shared,
        "matrix_instructions": ptx.count(DEVICES[capability][1]),
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global", ptx)),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor\S*\.global\.shared", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        **machine_code(kernel.asm["cubin"]),
    }


def wrong(work: Work, figures: dict[str, Any], capability: int) -> list[str]:
    """What is not as it should be."""
    multiplied = sum(figures["sass"].get(name, 0) for name in ("HMMA", "HGMMA", "UTCHMMA"))
    checks = {
        "too much shared memory": figures["shared_bytes"] > DEVICES[capability][0],
        "registers spilled": figures["stack_bytes"] > 0,
        "no matrix instructions": work.multiplies and not (figures["matrix_instructions"] and multiplied),
        "not by the copy engine": work.descriptors and not (figures["tma_loads"] and figures["sass"].get("UTMALDG")),
        "gathered rows wait for registers": work.gathers and not (figures["cp_async"] and figures["sass"].get("LDGSTS")),
    }
    return [complaint for complaint, is_wrong in checks.items() if is_wrong]


def main() -> int:
    """Compile for every device; 1 where a figure is not as it should be."""
    reports: dict[str, dict[str, Any]] = {}
    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the assembler is a process of its own
        for capability in DEVICES:
            names, given = zip(*works(capability), strict=True)
            reports[f"sm_{capability}"] = dict(zip(names, pool.map(compiled, given, repeat(capability)), strict=True))
            for name, work in zip(names, given, strict=True):
                for complaint in wrong(work, reports[f"sm_{capability}"][name], capability):
                    failed = True
                    print(f"sm_{capability} {name}: {complaint}: {reports[f'sm_{capability}'][name]}", file=sys.stderr)
    print(json.dumps(reports))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
