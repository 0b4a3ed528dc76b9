"""The routed feed-forward in Triton against torch's grouped products and a dense SwiGLU of equal FLOPs, on one CUDA device.

FLOPs are 6 T K n d forward and 18 T K n d with the backward pass; the router is in the time of the MoE layers but not in that count.
The contestants of a shape take turns, so that they meet the same clocks; times are medians of CUDA events. `make gpu` runs this.

Letters: T tokens, D width, F expert width, E experts, K experts chosen per token.
"""

# ruff: noqa: N803, N806, N815 - names of tensors carry their shape
from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels import dispatch, experts_grouped, experts_triton, router_naive
from kernels.activation import hidden
from kernels.combine_triton import combine
from kernels.grouped_gemm_triton import Blocks, grouped_gemm, make_tiles
from kernels.router_naive import Rule

Work = Callable[[], object]
Ffn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]
Route = Callable[["Layer"], tuple[Tensor, Tensor]]
BLOCKS = (None, Blocks(stages=4), Blocks(rows=64, warps=4, stages=4), Blocks(inner=32, stages=4))
WARM_UP, ROUNDS = 3, 20


@dataclass(frozen=True)
class Shape:
    """One MoE layer: tokens, width, expert width, experts, experts chosen per token."""

    tokens: int
    width: int
    expert_width: int
    experts: int
    top_k: int

    @property
    def forward_flops(self) -> int:
        """Of the three products of SwiGLU for every assignment."""
        return 6 * self.tokens * self.top_k * self.expert_width * self.width


SHAPES = (
    Shape(32768, 4096, 1024, 128, 8),
    Shape(32768, 2048, 768, 128, 8),  # Qwen3-30B-A3B
    Shape(24576, 1536, 256, 128, 8),
    Shape(4096, 2048, 1024, 64, 8),  # OLMoE
    Shape(8192, 4096, 14336, 8, 2),  # Mixtral
)


@dataclass(frozen=True)
class Layer:
    """Inputs and weights of one shape in bfloat16; the router's weights are random, so routing is as uneven as that makes it."""

    x_TD: Tensor
    w_router_ED: Tensor
    w_in_EHD: Tensor
    w_out_EDF: Tensor
    top_k: int

    @classmethod
    def random(cls, shape: Shape, device: str) -> Layer:
        """Inputs of deviation 0.2, weights of 0.02."""

        def normal(deviation: float, *size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=torch.bfloat16).normal_(0, deviation).requires_grad_()

        n_experts, width, expert_width = shape.experts, shape.width, shape.expert_width
        return cls(
            normal(0.2, shape.tokens, width),
            normal(0.02, n_experts, width),
            normal(0.02, n_experts, 2 * expert_width, width),
            normal(0.02, n_experts, width, expert_width),
            shape.top_k,
        )

    def route(self) -> tuple[Tensor, Tensor]:
        """Softmax of all scores in float32, then the K largest: experts and gates, [T, K]."""
        gate_TK, expert_TK = torch.softmax(self.x_TD @ self.w_router_ED.T, -1, dtype=torch.float32).topk(self.top_k)
        return expert_TK, gate_TK

    def route_triton(self) -> tuple[Tensor, Tensor]:
        """As `route`, by our kernel."""
        routed = dispatch.route(self.logits(), None, Rule(self.top_k))
        return routed.expert_TK, routed.gate_TK

    def logits(self) -> Tensor:
        """float32[T, E]."""
        return (self.x_TD @ self.w_router_ED.T).float()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The input and all weights."""
        return self.x_TD, self.w_router_ED, self.w_in_EHD, self.w_out_EDF

    def moe(self, ffn: Ffn, route: Route = route) -> Tensor:
        """The whole layer with one implementation of the router and one of the experts."""
        expert_TK, gate_TK = route(self)
        return ffn(self.x_TD, self.w_in_EHD, self.w_out_EDF, expert_TK, gate_TK, "swiglu")

    def moe_and_gradients(self, ffn: Ffn, route: Route = route) -> tuple[Tensor, ...]:
        """The layer's output and the gradients of its input and all its weights."""
        y_TD = self.moe(ffn, route)
        return y_TD, *torch.autograd.grad(y_TD, self.tensors, torch.ones_like(y_TD))


def _without_gradients(work: Work) -> Work:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def _triton(layer: Layer, blocks: Blocks | None) -> Work:
    return _without_gradients(lambda: layer.moe(partial(experts_triton.expert_ffn, blocks=blocks), Layer.route_triton))


def _dense(x_TD: Tensor, w_in_GD: Tensor, w_out_DF: Tensor) -> Tensor:
    return hidden(x_TD @ w_in_GD.T, "swiglu") @ w_out_DF.T


def contestants(shape: Shape, layer: Layer) -> dict[str, tuple[Work, int]]:
    """Name to what it runs and how many FLOPs that is by the convention."""
    dense_width = shape.top_k * shape.expert_width
    w_in_GD = layer.x_TD.new_empty(2 * dense_width, shape.width).normal_(0, 0.02).requires_grad_()
    w_out_DF = layer.x_TD.new_empty(shape.width, dense_width).normal_(0, 0.02).requires_grad_()
    inputs = (layer.x_TD, w_in_GD, w_out_DF)

    def dense_and_gradients() -> object:
        y_TD = _dense(*inputs)
        return torch.autograd.grad(y_TD, inputs, torch.ones_like(y_TD))

    forward, both = shape.forward_flops, 3 * shape.forward_flops
    found: dict[str, tuple[Work, int]] = {f"triton {block_name(blocks)} forward": (_triton(layer, blocks), forward) for blocks in BLOCKS}
    return found | {
        "grouped_mm forward": (_without_gradients(lambda: layer.moe(experts_grouped.expert_ffn)), forward),
        "dense forward": (_without_gradients(lambda: _dense(*inputs)), forward),
        "triton forward+backward": (lambda: layer.moe_and_gradients(experts_triton.expert_ffn, Layer.route_triton), both),
        "grouped_mm forward+backward": (lambda: layer.moe_and_gradients(experts_grouped.expert_ffn), both),
        "dense forward+backward": (dense_and_gradients, both),
    }


def block_name(blocks: Blocks | None) -> str:
    """Rows x outer x inner x warps x stages; `usual` for what the device gets unasked."""
    if blocks is None:
        return "usual"
    return "x".join(str(size) for size in astuple(blocks))


def parts(shape: Shape, layer: Layer) -> dict[str, tuple[Work, int]]:
    """The steps of the layer in Triton with the usual blocks, each alone; FLOPs are those of its own products."""
    with torch.no_grad():
        expert_TK, gate_TK = layer.route()
        logits_TE, rule = layer.logits(), Rule(shape.top_k)
        tiles = make_tiles(expert_TK, shape.experts, Blocks().rows)
        act_RF = grouped_gemm(layer.x_TD, layer.w_in_EHD, tiles, gather=True, activation="swiglu")
        y_RD = grouped_gemm(act_RF, layer.w_out_EDF, tiles, gather=False)
    works: dict[str, tuple[Work, int]] = {
        "router, with its product": (layer.route_triton, 0),
        "router": (lambda: dispatch.route(logits_TE, None, rule), 0),
        "router, torch": (lambda: router_naive.route(logits_TE, None, rule), 0),
        "tiles": (lambda: dispatch.make_tiles(expert_TK, shape.experts, Blocks().rows), 0),
        "tiles, by torch's sort": (lambda: make_tiles(expert_TK, shape.experts, Blocks().rows), 0),
        "up": (lambda: grouped_gemm(layer.x_TD, layer.w_in_EHD, tiles, gather=True, activation="swiglu"), shape.forward_flops // 3 * 2),
        "down": (lambda: grouped_gemm(act_RF, layer.w_out_EDF, tiles, gather=False), shape.forward_flops // 3),
        "combine": (lambda: combine(y_RD, tiles.row_TK, gate_TK, tiles.end_E[-1:]), 0),
    }
    return {name: (_without_gradients(work), flops) for name, (work, flops) in works.items()}


def measure(works: dict[str, tuple[Work, int]]) -> dict[str, dict[str, Any]]:
    """Median, fastest and slowest milliseconds of each, taking turns, and TFLOP/s; `error` for what this device has no room for."""
    failed: dict[str, dict[str, Any]] = {}
    for name, (work, _) in works.items():
        try:
            for _round in range(WARM_UP):
                work()
            torch.cuda.synchronize()
        except (OutOfResources, torch.cuda.OutOfMemoryError) as error:
            failed[name] = {"error": str(error).splitlines()[0][:200]}
            torch.cuda.empty_cache()
    running = {name: entry for name, entry in works.items() if name not in failed}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in running}
    for _round in range(ROUNDS):
        for name, (work, _) in running.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: _figures(events[name], flops) for name, (_, flops) in running.items()} | failed


def _figures(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]], flops: int) -> dict[str, Any]:
    times_ms = [start.elapsed_time(end) for start, end in pairs]
    median_ms = statistics.median(times_ms)
    figures = {"median_ms": median_ms, "fastest_ms": min(times_ms), "slowest_ms": max(times_ms)}
    return figures | ({"tflops_per_s": flops / median_ms / 1e9} if flops else {})


def benchmark(device: str = "cuda", shapes: tuple[Shape, ...] = SHAPES) -> list[dict[str, Any]]:
    """One entry per shape: the layers against each other, and the steps of ours."""
    found = []
    for shape in shapes:
        torch.manual_seed(0)
        layer = Layer.random(shape, device)
        found.append({"shape": asdict(shape), "layers": measure(contestants(shape, layer)), "parts": measure(parts(shape, layer))})
        del layer
        torch.cuda.empty_cache()
    return found
