"""What `benchmarks.gpu` checks of the layer: every Triton operation against float64."""

# ruff: noqa: N806 - names of tensors carry their shape
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels import experts_naive, experts_triton, grouped_gemm_naive
from kernels.activation import GATED
from kernels.blocks import Blocks
from kernels.combine_triton import combine
from kernels.grouped_gemm_triton import grouped_gemm, make_tiles, usual
from kernels.tf32_triton import rounded

ROUTINGS = ("spread", "empty experts", "all to one", "dropped", "all dropped")
# T, K, E, D, F, of the last in whole tiles; and what the layer is also checked with beside swiglu: swiglu_clamped with biases
SHAPES = {
    (1, 1, 4, 16, 16): "swiglu_clamped",
    (37, 3, 6, 20, 24): "geglu",
    (257, 2, 5, 129, 65): "relu",
    (333, 8, 64, 96, 200): "gelu",
    (1024, 4, 8, 256, 512): "swiglu_clamped",
}
# of ||out - ref|| / ||ref||; float32 in tf32, and in three products of it, as torch's own products were told
MOST = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}
MOST_EXACT = 1e-5
PRECISIONS = {"tf32": "high", "tf32x3": "highest"}
Shape = tuple[int, int, int, int, int]
Check = tuple[str, float, float]  # what was compared, its error, the largest error it may have
Found = tuple[dict[str, float], list[str]]  # the worst error of each operation, and what is beyond what it may be


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


def operations(device: str, dtype: torch.dtype, kind: str, shape: Shape) -> Iterator[Check]:
    """Every operation in Triton on one routing; rows that it must not read hold NaN."""
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
        if dtype != torch.float32:  # whose tiles leave less room for the loop's
            loop = usual(a, "up" if gather else "down", gated=activation in GATED, n_outer=w.shape[1])
            loop = replace(loop, persistent=True, stages=loop.stages - 1)
            looped = grouped_gemm(a, w, tiles, gather=gather, activation=activation, blocks=loop)[:kept]
            yield f"{name} in a loop", error(looped, ref), MOST[dtype]
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
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(PRECISIONS[way])
        got, ref = (run(*of[:3], expert_TK, of[3], activation, *of[4:]) for run, of in zip(layers, (given, exact), strict=True))
        dy_TD = torch.randn_like(got)
        gradients = torch.autograd.grad(got, given, dy_TD), torch.autograd.grad(ref, exact, dy_TD.double())
        torch.set_float32_matmul_precision(before)
        yield f"expert_ffn {activation}{suffix[way]}", error(got, ref), most[way]
        for name, mine, wanted in zip(("dx", "dw_in", "dw_out", "dgate", "db_in")[: len(given)], *gradients, strict=True):
            yield f"expert_ffn {activation} {name}{suffix[way]}", error(mine, wanted), most[way]


def numerics(device: str, dtype: torch.dtype, shapes: Iterable[Shape] = tuple(SHAPES)) -> Found:
    """The worst error of each operation in one type, and the cases that are beyond what they may be."""
    worst: dict[str, float] = defaultdict(float)
    failures = []
    torch.manual_seed(0)
    for shape, kind in product(shapes, ROUTINGS):
        for name, found, most in operations(device, dtype, kind, shape):
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            worst[key] = max(worst[key], found)
            if found > most:
                failures.append(f"{key}, {kind}, T K E D F = {shape}: {found:.2e} > {most:.0e}")
    return dict(worst), failures
