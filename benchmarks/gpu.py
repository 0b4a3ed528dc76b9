"""What needs a CUDA device, in one call under ten minutes: `make gpu` or `python -m benchmarks.gpu`. Prints one JSON object.

Numerics of every Triton operation against float64, determinism over 40 repeats, the layer in a CUDA graph, `benchmarks.kernels` and
`benchmarks.train_gpu`, each with its share of the time. Needs torch, triton and numpy alone, but for the last, which wants moelab with its extra
`train`, and transformers; peers are measured where they are installed. The figures also go to benchmarks/results/gpu-DATE-DEVICE.json. Exit
code 1 where a check fails, 3 without a device.
"""

# ruff: noqa: N806 - names of tensors carry their shape
from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
REPEATS = 40
ROUTINGS = ("spread", "empty experts", "all to one", "dropped", "all dropped")
NUMERICS_S, BENCHMARK_S = 150.0, 200.0  # the router's kernels, the graph and the whole step have what is left of ten minutes
# T, K, E, D, F, of the last in whole tiles; and what the layer is also checked with beside swiglu: swiglu_clamped with biases
SHAPES = {
    (1, 1, 4, 16, 16): "swiglu_clamped",
    (37, 3, 6, 20, 24): "geglu",
    (257, 2, 5, 129, 65): "relu",
    (333, 8, 64, 96, 200): "gelu",
    (1024, 4, 8, 256, 512): "swiglu_clamped",
}
OURS = (
    "router",
    "tiles",
    "up",
    "down",
    "combine",
    "hidden gradient",
    "input gradient",
    "weight gradient in",
    "weight gradient out",
)  # of the benchmark's parts
# of ||out - ref|| / ||ref||; float32 in tf32, and in three products of it, as torch's own products were told
MOST = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
MOST_EXACT = 1e-5
PRECISIONS = {"tf32": "high", "tf32x3": "highest"}
Check = tuple[str, float, float]  # what was compared, its error, the largest error it may have


def choose(kind: str, n_tokens: int, top_k: int, n_experts: int, device: str) -> Tensor:
    """int64[T, K] of experts; E is a dropped assignment."""
    expert_TK = torch.rand(n_tokens, n_experts, device=device).argsort(-1)[:, :top_k].clone()
    if kind == "empty experts":
        return torch.arange(top_k, device=device).expand(n_tokens, top_k).clone()
    if kind in ("all to one", "all dropped"):
        return torch.full_like(expert_TK, n_experts - 1 if kind == "all to one" else n_experts)
    if kind == "dropped":
        expert_TK[torch.rand(n_tokens, top_k, device=device) < 0.4] = n_experts
    return expert_TK


def error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref||, absolute where the reference is zero; 1e30 for what is not finite."""
    out, ref = out.detach(), ref.detach()
    norm = ref.double().norm()
    found = (out.double() - ref.double()).norm() / torch.where(norm > 0, norm, 1.0)
    return float(found.nan_to_num(1e30, 1e30))


def operations(device: str, dtype: torch.dtype, kind: str, shape: tuple[int, int, int, int, int]) -> Iterator[Check]:
    """Every operation in Triton on one routing; rows that it must not read hold NaN."""
    from kernels import experts_naive, experts_triton, grouped_gemm_naive
    from kernels.activation import GATED
    from kernels.blocks import Blocks
    from kernels.combine_triton import combine
    from kernels.grouped_gemm_triton import grouped_gemm, make_tiles
    from kernels.tf32_triton import rounded

    n_tokens, top_k, n_experts, width, expert_width = shape
    expert_TK = choose(kind, n_tokens, top_k, n_experts, device)
    tiles = make_tiles(expert_TK, n_experts, Blocks().rows)
    kept, end_E = int((expert_TK < n_experts).sum()), tiles.end_E.tolist()
    x_TD = torch.randn(n_tokens, width, device=device).to(dtype)
    gate_TK = torch.rand(n_tokens, top_k, device=device)
    w_in_EHD = torch.randn(n_experts, 2 * expert_width, width, device=device).mul_(width**-0.5).to(dtype)
    w_out_EDF = torch.randn(n_experts, width, expert_width, device=device).mul_(expert_width**-0.5).to(dtype)
    act_RF = torch.randn(n_tokens * top_k, expert_width, device=device).to(dtype)
    act_RF[kept:] = float("nan")
    products = (("up", x_TD, w_in_EHD, True, "none"), ("up swiglu", x_TD, w_in_EHD, True, "swiglu"), ("down", act_RF, w_out_EDF, False, "none"))
    ways = PRECISIONS if dtype == torch.float32 else ("tf32",)
    suffix = {way: f" {way}" if dtype == torch.float32 else "" for way in ways}
    most = {way: MOST_EXACT if way == "tf32x3" else MOST[dtype] for way in ways}
    for name, a, w, gather, activation in products:
        ref = grouped_gemm_naive.grouped_gemm(a.double(), w.double(), tiles.token_R, end_E, gather=gather, activation=activation)[:kept]
        for way in ways:
            got = grouped_gemm(rounded(a, way) if gather else a, w, tiles, gather=gather, activation=activation, precision=way)[:kept]
            yield name + suffix[way], error(got, ref), most[way]
    y_RD = torch.randn(n_tokens * top_k, width, device=device).to(dtype)
    y_RD[kept:] = float("nan")
    y_TKD = torch.where((expert_TK < n_experts)[:, :, None], y_RD.double()[tiles.row_TK], 0)
    yield "combine", error(combine(y_RD, tiles.row_TK, gate_TK, tiles.end_E[-1:]), (y_TKD * gate_TK.double()[:, :, None]).sum(1)), MOST[dtype]
    layers: tuple[Any, Any] = experts_triton.expert_ffn, experts_naive.expert_ffn
    for activation, way in product(("swiglu", SHAPES.get(shape, "swiglu_clamped")), ways):
        w_EHD = w_in_EHD if activation in GATED else w_in_EHD[:, :expert_width]
        biases = [torch.randn(w_EHD.shape[:2], device=device)] if activation == "swiglu_clamped" else []
        given = [tensor.detach().requires_grad_() for tensor in (x_TD, w_EHD, w_out_EDF, gate_TK, *biases)]
        exact = [tensor.detach().double().requires_grad_() for tensor in given]
        usual = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(PRECISIONS[way])
        got, ref = (run(*of[:3], expert_TK, of[3], activation, *of[4:]) for run, of in zip(layers, (given, exact), strict=True))
        dy_TD = torch.randn_like(got)
        gradients = torch.autograd.grad(got, given, dy_TD), torch.autograd.grad(ref, exact, dy_TD.double())
        torch.set_float32_matmul_precision(usual)
        yield f"expert_ffn {activation}{suffix[way]}", error(got, ref), most[way]
        for name, mine, wanted in zip(("dx", "dw_in", "dw_out", "dgate", "db_in")[: len(given)], *gradients, strict=True):
            yield f"expert_ffn {activation} {name}{suffix[way]}", error(mine, wanted), most[way]


def numerics(device: str = "cuda", shapes: Iterable[tuple[int, int, int, int, int]] = tuple(SHAPES)) -> tuple[dict[str, float], list[str]]:
    """The worst error of each operation and type, and the cases that are beyond what they may be, or that NUMERICS_S left no time for."""
    worst: dict[str, float] = defaultdict(float)
    failures = []
    end = time.monotonic() + NUMERICS_S
    torch.manual_seed(0)
    for dtype, shape, kind in product(MOST, shapes, ROUTINGS):
        case = f"{str(dtype).removeprefix('torch.')}, {kind}, T K E D F = {shape}"
        if time.monotonic() > end:
            failures.append(f"{case}: not checked, no time was left")
            continue
        for name, found, most in operations(device, dtype, kind, shape):
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            worst[key] = max(worst[key], found)
            if found > most:
                failures.append(f"{name} {case}: {found:.2e} > {most:.0e}")
    return dict(worst), failures


def determinism(device: str = "cuda") -> tuple[dict[str, int], list[str]]:
    """How many of the repeats gave the very bits of the first, forward and backward, of Triton's and torch's layer."""
    from benchmarks import gpu_routing
    from benchmarks.kernels import Layer, Shape
    from kernels import experts_grouped, experts_triton

    torch.manual_seed(0)
    layer = Layer.random(Shape(tokens=4096, width=512, expert_width=256, experts=64, top_k=8), device)

    works: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "triton forward+backward": lambda: layer.moe_and_gradients(experts_triton.expert_ffn, Layer.route_triton),
        "grouped_mm forward+backward": lambda: layer.moe_and_gradients(experts_grouped.expert_ffn),
    }
    works |= gpu_routing.repeated(device)
    equal: dict[str, int] = {}
    for name, work in works.items():
        first = work()
        equal[name] = sum(all(torch.equal(a, b) for a, b in zip(work(), first, strict=True)) for _ in range(REPEATS))
    return equal, [f"{name}: {count} of {REPEATS} repeats gave the same bits" for name, count in equal.items() if count < REPEATS]


def training() -> dict[str, Any]:
    """A whole training step against transformers (benchmarks.train_gpu), where its packages are installed; what it raises takes nothing else away."""
    try:
        from benchmarks import train_gpu

        return train_gpu.benchmark()
    except ImportError as error:
        return {"skipped": str(error)}
    except Exception as error:  # what was measured before is worth keeping
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def versions() -> dict[str, Any]:
    """What the figures depend on: device, driver, the clocks it may have, torch and triton."""
    import triton

    from benchmarks.device_time import smi

    major, minor = torch.cuda.get_device_capability()
    found = {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", **smi("driver_version", "clocks.max.sm", "power.limit")}
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}


def broken(measured: dict[str, Any]) -> list[str]:
    """What of ours did not run in the benchmark; a peer may fail."""
    rows = [(shape["shape"], name, row) for shape in measured["shapes"] for part in ("layers", "parts") for name, row in shape.get(part, {}).items()]
    ours = [(shape, name, row) for shape, name, row in rows if name.startswith("triton ") or name in OURS]
    return [f"{name} of {shape}: {row['error']}" for shape, name, row in ours if "error" in row]


def check() -> int:
    """Everything in order; the exit code."""
    if not torch.cuda.is_available():
        print("No CUDA device: these checks and figures need one. `make kernels-aot` compiles the kernels without.", file=sys.stderr)
        return 3
    started = time.monotonic()
    from benchmarks import gpu_routing
    from benchmarks.kernels import benchmark

    errors, wrong = numerics()
    routed, misrouted = gpu_routing.numerics("cuda", ROUTINGS, tuple(shape[:3] for shape in (*SHAPES, (32768, 8, 128, 0, 0))))
    equal, uneven = determinism()
    graph, torn = gpu_routing.replay()
    measured = benchmark(budget_s=BENCHMARK_S)
    whole_step = training()
    failures = wrong + misrouted + uneven + torn + broken(measured) + [f"training step: {whole_step['error']}"] * ("error" in whole_step)
    for line in failures:
        print(line, file=sys.stderr)
    date = time.strftime("%Y-%m-%d", time.gmtime())
    figures: dict[str, Any] = {"date": date, "versions": versions(), "failures": failures, "errors": errors | routed, "graph": graph}
    figures |= {"repeats": REPEATS, "equal_repeats": equal}
    figures |= {"benchmark": measured, "training": whole_step, "seconds": round(time.monotonic() - started, 1)}
    RESULTS.mkdir(exist_ok=True)
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    (RESULTS / f"gpu-{date}-{device}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported, which the functions above put off until they run
    sys.exit(check())
