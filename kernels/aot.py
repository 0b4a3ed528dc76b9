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
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from kernels.combine_triton import _combine
from kernels.grouped_gemm_triton import Blocks, _grouped_gemm, usual_blocks

# compute capability: shared memory of one block in bytes, the instruction that its matrix units run
DEVICES = {80: (166_912, "mma.sync"), 90: (232_448, "wgmma.mma_async"), 100: (232_448, "tcgen05.mma")}


def grouped_gemm_source(dtype: str, *, swiglu: bool, blocks: Blocks) -> ASTSource:
    """The up-projection's kernel (gathering), or with `swiglu` its fused form, for aligned tensors."""
    constants: dict[str, Any] = {
        "N_EXPERTS": 64, "GATHER": True, "SWIGLU": swiglu, "PRECISION": "tf32", "stride_wa": 1,
        "BLOCK_ROWS": blocks.rows, "BLOCK_OUTER": blocks.outer, "BLOCK_INNER": blocks.inner,
    }  # fmt: skip
    names = _grouped_gemm.arg_names
    pointers = {"a": dtype, "w": dtype, "out": dtype, "token": "i32", "end": "i32", "tile_expert": "i32", "tile_start": "i32"}
    types = {name: "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    return ASTSource(_grouped_gemm, types, constants, aligned)


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
    sources: dict[str, tuple[ASTSource, dict[str, int]]] = {"combine": (combine_source("bf16"), {})}
    for dtype, element_bytes, suffix in (("bf16", 2, ""), ("fp32", 4, " float32")):
        for name, swiglu in (("grouped_gemm", False), ("grouped_gemm swiglu", True)):
            blocks = usual_blocks(capability // 10, element_bytes, swiglu=swiglu)
            options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
            sources[name + suffix] = grouped_gemm_source(dtype, swiglu=swiglu, blocks=blocks), options
    found = {}
    for name, (source, options) in sources.items():
        kernel = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
        found[name] = {"shared_bytes": kernel.metadata.shared, "matrix_instructions": kernel.asm["ptx"].count(instruction)}
        found[name] |= resources(kernel.asm["cubin"])
    return found


def main() -> int:
    """Compile for every device; 1 where a figure is not as it should be."""
    reports = {capability: report(capability) for capability in DEVICES}
    wrong = [
        f"sm_{capability} {name}: {figures}"
        for capability, kernels in reports.items()
        for name, figures in kernels.items()
        if figures["shared_bytes"] > DEVICES[capability][0]
        or (figures["matrix_instructions"] == 0) == name.startswith("grouped")
        or figures["stack_bytes"] > 0
    ]
    for line in wrong:
        print(line, file=sys.stderr)
    print(json.dumps({f"sm_{capability}": figures for capability, figures in reports.items()}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
