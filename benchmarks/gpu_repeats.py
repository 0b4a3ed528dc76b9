"""What `benchmarks.gpu` repeats: that every repeat gives the same bits, and that the layer waits for nothing and can be captured in a CUDA graph."""

# ruff: noqa: N806 - names of tensors carry their shape
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_routing
from benchmarks.gpu_layer import MOST, error
from benchmarks.kernels import Layer, Shape
from kernels import experts_grouped, experts_triton

REPEATS = 40
SMALL = Shape(tokens=4096, width=512, expert_width=256, experts=64, top_k=8)


def determinism(device: str = "cuda") -> tuple[dict[str, int], list[str]]:
    """How many of the repeats gave the very bits of the first, forward and backward, of Triton's and torch's layer."""
    torch.manual_seed(0)
    layer = Layer.random(SMALL, device)
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


def replay() -> tuple[dict[str, Any], list[str]]:
    """The whole layer, forward and backward: that it waits for nothing, and that a graph of it follows the routing.

    The graph is captured once. Then other tokens and weights are put into its buffers, at last a router of zeros, to which all experts are
    equal, so that the first k get everything; each replay is compared with the layer as it runs without a graph.
    """
    torch.manual_seed(0)
    layer, other = Layer.random(SMALL, "cuda"), Layer.random(SMALL, "cuda")

    def work() -> tuple[Tensor, ...]:
        return layer.moe_and_gradients(experts_triton.expert_ffn, Layer.route_triton)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    failures = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as waited:
        failures.append(f"the layer waits for the device: {waited}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if failures:
        return {"waits": True}, failures
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    found: dict[str, Any] = {"waits": False}
    for name in ("other tokens and weights", "all to the first experts"):
        before_E = layer.route_triton()[0].flatten().bincount(minlength=SMALL.experts)
        with torch.no_grad():
            if name == "all to the first experts":
                layer.w_router_ED.zero_()
            else:
                for mine, theirs in zip(layer.tensors, other.tensors, strict=True):
                    mine.copy_(theirs)
        graph.replay()
        replayed = [part.clone() for part in captured]
        wanted = work()
        after_E = layer.route_triton()[0].flatten().bincount(minlength=SMALL.experts)
        errors = [error(mine, theirs) for mine, theirs in zip(replayed, wanted, strict=True)]
        bits = all(torch.equal(mine, theirs) for mine, theirs in zip(replayed, wanted, strict=True))
        found[name] = {"moved": int((after_E - before_E).abs().sum()) // 2, "worst_error": max(errors), "same_bits": bits}
        if max(errors) > MOST[torch.bfloat16] or not found[name]["moved"]:
            failures.append(f"graph, {name}: {found[name]}")
    return found, failures
