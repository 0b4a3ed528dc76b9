"""The MoE layer in Triton against its peers and a dense SwiGLU of equal FLOPs, on one CUDA device, in the same run. `make gpu` runs this.

FLOPs are 6 T K n d forward and 18 T K n d with the backward pass; the router is in the time of the MoE layers but not in that count. Peers that
are not installed are named as such. The figures to reach, of one H100, stand beside what was measured.

Letters: T tokens, D width, F expert width, E experts, K experts chosen per token.
"""

# ruff: noqa: N803, N806, N815 - names of tensors carry their shape
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.device_time import Work, clocks, measure
from kernels import dispatch, experts_grouped, experts_triton, router_naive
from kernels.activation import hidden
from kernels.blocks import layer_blocks
from kernels.combine_triton import combine
from kernels.experts_backward_triton import hidden_gradient, weight_gradient
from kernels.grouped_gemm_triton import grouped_gemm, make_tiles
from kernels.router_naive import Rule

Ffn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]
Route = Callable[["Layer"], tuple[Tensor, Tensor]]
PASSES = ("forward", "forward+backward")


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

    @property
    def most_kept_bytes(self) -> int:
        """In bfloat16: the input, and the up-projection's output (SonicMoE 2025, section 3.2)."""
        return 2 * self.tokens * self.width + 4 * self.tokens * self.top_k * self.expert_width


# TFLOP/s of one H100, forward and with the backward pass: to be reached, and aimed at; None: to be ahead of every peer
TARGETS: dict[Shape, tuple[tuple[int, int], tuple[int, int]] | None] = {
    Shape(32768, 4096, 1024, 128, 8): ((430, 500), (380, 430)),
    Shape(32768, 2048, 768, 128, 8): ((380, 500), (330, 410)),  # Qwen3-30B-A3B
    Shape(24576, 1536, 256, 128, 8): ((260, 320), (270, 330)),
    Shape(4096, 2048, 1024, 64, 8): None,  # OLMoE
    Shape(8192, 4096, 14336, 8, 2): None,  # Mixtral
}


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
        return self.gradients(self.moe(ffn, route))

    def gradients(self, y_TD: Tensor) -> tuple[Tensor, ...]:
        """`y_TD`, made of this layer, and the gradients of the input and all weights."""
        return y_TD, *torch.autograd.grad(y_TD, self.tensors, torch.ones_like(y_TD))


def _without_gradients(work: Work) -> Work:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def _dense(x_TD: Tensor, w_in_GD: Tensor, w_out_DF: Tensor) -> Tensor:
    return hidden(x_TD @ w_in_GD.T, "swiglu") @ w_out_DF.T


def _dense_layer(shape: Shape, layer: Layer) -> tuple[Work, Work]:
    """A SwiGLU of as many FLOPs as a token's experts, forward and with the backward pass."""
    dense_width = shape.top_k * shape.expert_width
    w_in_GD = layer.x_TD.new_empty(2 * dense_width, shape.width).normal_(0, 0.02).requires_grad_()
    w_out_DF = layer.x_TD.new_empty(shape.width, dense_width).normal_(0, 0.02).requires_grad_()
    inputs = (layer.x_TD, w_in_GD, w_out_DF)

    def both() -> object:
        y_TD = _dense(*inputs)
        return torch.autograd.grad(y_TD, inputs, torch.ones_like(y_TD))

    return _without_gradients(lambda: _dense(*inputs)), both


OURS: dict[str, peers.Run] = {
    "triton": lambda of: of.moe(experts_triton.expert_ffn, Layer.route_triton),
    "grouped_mm": lambda of: of.moe(experts_grouped.expert_ffn),
}


def kept_bytes(layer: Layer, runs: dict[str, peers.Run]) -> dict[str, int]:
    """What each keeps on the device from the forward to the backward pass, beside the layer's input and output."""
    found: dict[str, int] = {}
    for name, run in runs.items():
        before = torch.cuda.memory_allocated()
        y_TD = run(layer)
        found[name] = torch.cuda.memory_allocated() - before - y_TD.nbytes
        del y_TD
    return found


def contestants(shape: Shape, layer: Layer, others: dict[str, peers.Run]) -> dict[str, tuple[Work, int]]:
    """Name and pass to what it runs and how many FLOPs that is by the convention: ours, the peers, and the dense layer."""
    found: dict[str, tuple[Work, int]] = {}
    for name, run in (OURS | others).items():

        def forward(run: peers.Run = run) -> object:
            return run(layer)

        def both(run: peers.Run = run) -> object:
            return layer.gradients(run(layer))

        found[f"{name} forward"] = _without_gradients(forward), shape.forward_flops
        found[f"{name} forward+backward"] = both, 3 * shape.forward_flops
    for which, work, flops in zip(PASSES, _dense_layer(shape, layer), (shape.forward_flops, 3 * shape.forward_flops), strict=True):
        found[f"dense {which}"] = work, flops
    return found


def parts(shape: Shape, layer: Layer) -> dict[str, tuple[Work, int]]:
    """The steps of the layer in Triton, each alone; FLOPs are those of its own products. Beside them the same products of equal experts in cuBLAS."""
    blocks = layer_blocks(layer.x_TD, shape.experts, shape.expert_width, shape.tokens * shape.top_k, gated=True)
    x_TD, w_in, w_out, third = layer.x_TD, layer.w_in_EHD, layer.w_out_EDF, shape.forward_flops // 3
    with torch.no_grad():
        expert_TK, gate_TK = layer.route()
        logits_TE, rule = layer.logits(), Rule(shape.top_k)
        tiles = make_tiles(expert_TK, shape.experts, blocks.up.rows)
        h_RH = x_TD.new_empty(len(tiles.token_R), w_in.shape[1])
        act_RF = grouped_gemm(x_TD, w_in, tiles, gather=True, activation="swiglu", kept=h_RH, blocks=blocks.up)
        y_RD = grouped_gemm(act_RF, w_out, tiles, gather=False, blocks=blocks.down)
        equal_ERD = x_TD.new_empty(shape.experts, len(tiles.token_R) // shape.experts, shape.width).normal_()

    def up() -> Tensor:
        return grouped_gemm(x_TD, w_in, tiles, gather=True, activation="swiglu", kept=h_RH, blocks=blocks.up)

    works: dict[str, tuple[Work, int]] = {
        "router, with its product": (layer.route_triton, 0),
        "router": (lambda: dispatch.route(logits_TE, None, rule), 0),
        "router, torch": (lambda: router_naive.route(logits_TE, None, rule), 0),
        "tiles": (lambda: dispatch.make_tiles(expert_TK, shape.experts, blocks.up.rows), 0),
        "tiles, by torch's sort": (lambda: make_tiles(expert_TK, shape.experts, blocks.up.rows), 0),
        "up": (up, 2 * third),
        "down": (lambda: grouped_gemm(act_RF, w_out, tiles, gather=False, blocks=blocks.down), third),
        "combine": (lambda: combine(y_RD, tiles.row_TK, gate_TK, tiles.end_E[-1:]), 0),
        "hidden gradient": (lambda: hidden_gradient(x_TD, w_out, h_RH, gate_TK, tiles, "swiglu", blocks.hidden), third),
        "input gradient": (lambda: grouped_gemm(h_RH, w_in.transpose(1, 2), tiles, gather=False, blocks=blocks.input), 2 * third),
        "weight gradient in": (
            lambda: weight_gradient(h_RH, x_TD, tiles, gather="right", dtype=x_TD.dtype, blocks=blocks.weight_in),
            2 * third,
        ),
        "weight gradient out": (
            lambda: weight_gradient(x_TD, act_RF, tiles, gather="left", dtype=x_TD.dtype, blocks=blocks.weight_out),
            third,
        ),
        "up in cuBLAS, equal experts": (lambda: torch.bmm(equal_ERD, w_in.transpose(1, 2)), 2 * third),
    }
    return {name: (_without_gradients(work), flops) for name, (work, flops) in works.items()}


def verdict(shape: Shape, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each pass: our speed over the best peer's (the dense layer is none), and whether what was to be reached is."""
    found: dict[str, dict[str, Any]] = {}
    for i, which in enumerate(PASSES):
        rows = {name.removesuffix(f" {which}"): row for name, row in layers.items() if name.endswith(f" {which}")}
        speed = {name: row["tflops_per_s"] for name, row in rows.items() if "error" not in row}
        ours, dense = speed.pop("triton", 0.0), speed.pop("dense", None)
        best = max(speed, key=speed.__getitem__, default=None)
        said: dict[str, Any] = {"tflops_per_s": ours, "best_peer": best, "over_best_peer": ours / speed[best] if best else None}
        said["over_dense"] = ours / dense if dense else None
        said["ahead_of_every_peer"] = ours > speed[best] if best else None
        target = TARGETS.get(shape)
        if target is not None:
            floor, aim = target[i]
            said |= {"floor": floor, "floor_reached": ours >= floor, "aim": aim, "aim_reached": ours >= aim}
        found[which] = said
    return found


def benchmark(shape: Shape, device: str, seconds: float) -> dict[str, Any]:
    """Of one shape: which peers there are, the layers against each other, the verdict, and the steps of ours, in about `seconds`."""
    started = time.monotonic()
    others, absent = peers.installed()
    torch.manual_seed(0)
    layer = Layer.random(shape, device)
    layers = measure(contestants(shape, layer, others), started + seconds * 0.75)
    steps = measure(parts(shape, layer), started + seconds)
    kept = kept_bytes(layer, {name: run for name, run in (OURS | others).items() if "error" not in layers[f"{name} forward+backward"]})
    said: dict[str, Any] = {"peers": {**dict.fromkeys(others, "measured"), **absent}, "shape": asdict(shape)}
    said |= {"kept_bytes": kept, "most_kept_bytes": shape.most_kept_bytes}
    return said | {"layers": layers, "verdict": verdict(shape, layers), "parts": steps, "clocks": clocks()}
