"""Compile the Triton kernels for GPUs that are not here: `python -m kernels.aot`. The last line is one JSON object.

Fails (exit 1) where a kernel does not compile, needs more shared memory than the device has, spills registers, or does not use the
matrix units.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from kernels import aot_routing
from kernels.combine_triton import _combine
from kernels.experts_backward_triton import _hidden_gradient, _weight_gradient
from kernels.grouped_gemm_triton import Blocks, _grouped_gemm, usual_blocks

# compute capability: shared memory of one block in bytes, the instruction that its matrix units run
DEVICES = {80: (166_912, "mma.sync"), 90: (232_448, "wgmma.mma_async"), 100: (232_448, "tcgen05.mma")}


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """A kernel of the grouped products for aligned tensors: pointers by their names, the rest 32-bit integers."""
    indices = ("token", "slot", "end", "tile_expert", "tile_start", "left_row", "right_row")
    pointers = dict.fromkeys(("a", "w", "out", "kept", "dy", "hidden", "dhidden", "act", "left", "right"), f"*{dtype}")
    pointers |= dict.fromkeys(indices, "*i32") | {"gate": "*fp32", "dgate": "*fp32"}
    types = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    return ASTSource(kernel, types, constants, aligned)


def _tile(blocks: Blocks) -> dict[str, int]:
    return {"BLOCK_ROWS": blocks.rows, "BLOCK_OUTER": blocks.outer, "BLOCK_INNER": blocks.inner}


def sources(generation: int, dtype: str, element_bytes: int) -> Iterator[tuple[str, ASTSource, Blocks]]:
    """Name, source and tile sizes of each product of the layer: the up-projection with and without its activation, and the gradients'."""
    wide, narrow, last = (usual_blocks(generation, element_bytes, kernel) for kernel in ("plain", "gated", "gradient"))
    plain = {"PRECISION": "tf32", "stride_wa": 1, "N_EXPERTS": 64}
    product = {**plain, "GATHER": True, "KEEP": False, "EVEN": True}
    yield "grouped_gemm", source(_grouped_gemm, dtype, {**product, "ACTIVATION": "none", "IS_GATED": False, **_tile(wide)}), wide
    fused = {**product, "ACTIVATION": "swiglu", "IS_GATED": True, **_tile(narrow)}
    yield "grouped_gemm swiglu", source(_grouped_gemm, dtype, fused), narrow
    yield "grouped_gemm swiglu, kept", source(_grouped_gemm, dtype, {**fused, "KEEP": True}), narrow
    back = {"PRECISION": "tf32", "stride_wb": 1, "N_EXPERTS": 64, "ACTIVATION": "swiglu", "IS_GATED": True, **_tile(last)}
    yield "hidden_gradient", source(_hidden_gradient, dtype, back), last
    across = {"PRECISION": "tf32", "BLOCK_LEFT": wide.rows, "BLOCK_RIGHT": wide.outer, "BLOCK_ROWS": wide.inner}
    for side in ("left", "right"):
        constants = {**across, "GATHER_LEFT": side == "left", "GATHER_RIGHT": side == "right"}
        yield f"weight_gradient {side}", source(_weight_gradient, dtype, constants), wide


def combine_source(dtype: str) -> ASTSource:
    """The gather-and-sum of eight rows a token."""
    constants = {"K": 8, "BLOCK": 1024}
    types = {"y": f"*{dtype}", "row": "*i64", "gate": "*fp32", "end": "*i32", "out": f"*{dtype}", "width": "i32", "stride_y": "i32"}
    return ASTSource(_combine, {**types, "K": "constexpr", "BLOCK": "constexpr"}, constants, {})


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of stack per thread, read from the machine code; registers that were spilled lie on the stack."""
    cuobjdump = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    if found is None:
        raise ValueError(f"cuobjdump reports no registers: {listing[:200]!r}")
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def report(capability: int) -> dict[str, dict[str, int]]:
    """Kernel to its shared memory in bytes, its count of matrix instructions and its `resources`, compiled for one device."""
    instruction = DEVICES[capability][1]
    works: dict[str, tuple[ASTSource, dict[str, int]]] = {"combine": (combine_source("bf16"), {})}
    works |= {name: (kernel, {"num_warps": warps}) for name, kernel, warps in aot_routing.works()}
    for dtype, element_bytes, suffix in (("bf16", 2, ""), ("fp32", 4, " float32")):
        for name, kernel, blocks in sources(capability // 10, dtype, element_bytes):
            works[name + suffix] = kernel, {"num_warps": blocks.warps, "num_stages": blocks.stages}
    found = {}
    for name, (kernel_source, options) in works.items():
        kernel = compile_kernel(kernel_source, target=GPUTarget("cuda", capability, 32), options=options)
        found[name] = {"shared_bytes": kernel.metadata.shared, "matrix_instructions": kernel.asm["ptx"].count(instruction)}
        found[name] |= resources(kernel.asm["cubin"])
    return found


def main() -> int:
    """Compile for every device; 1 where a figure is not as it should be."""
    reports = {capability: report(capability) for capability in DEVICES}
    without_products = {"combine", *(name for name, _, _ in aot_routing.works())}
    wrong = [
        f"sm_{capability} {name}: {figures}"
        for capability, kernels in reports.items()
        for name, figures in kernels.items()
        if figures["shared_bytes"] > DEVICES[capability][0]
        or (figures["matrix_instructions"] == 0) == (name not in without_products)
        or figures["stack_bytes"] > 0
    ]
    for line in wrong:
        print(line, file=sys.stderr)
    print(json.dumps({f"sm_{capability}": figures for capability, figures in reports.items()}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
