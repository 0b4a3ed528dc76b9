"""The kernels of routing, to be compiled ahead by `kernels.aot`: the router forward and backward, and the sorting by expert.

They run no matrix products; what is looked for is that none needs stack. The shapes are those of published models and the largest that are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
from triton.compiler import ASTSource

from kernels.router_naive import Rule
from kernels.router_triton import _route, _route_backward, constants, constants_backward
from kernels.tiles_triton import BLOCK, PART, _count, _map, _place

ROUTERS = {
    "mixtral": (8, Rule(2, gate="softmax")),
    "olmoe": (64, Rule(8)),
    "qwen3": (128, Rule(8, gate="normalised")),
    "deepseek-v2": (160, Rule(6, scale=16.0, n_groups=8, top_groups=3)),
    "deepseek-v3": (256, Rule(8, "sigmoid", "normalised", scale=2.5, n_groups=8, top_groups=4, group_score="top2_sum")),
    "llama4": (128, Rule(1, "sigmoid", by_logit=True)),
    "largest": (1024, Rule(32, "sigmoid", "normalised", n_groups=32, top_groups=16, group_score="top2_sum")),
    "largest, softmax": (1024, Rule(32, gate="softmax")),
    "padded groups": (1020, Rule(32, "sigmoid", "normalised", n_groups=510, top_groups=200, group_score="top2_sum")),
    "widest tile": (561, Rule(32, "sigmoid", "normalised", n_groups=33, top_groups=20, group_score="top2_sum")),
}
BIASED = ("deepseek-v3", "largest", "padded groups", "widest tile")
OUTPUTS = {"expert_out": "*i64", "expert_in": "*i64", "count_out": "*i32", "sum_out": "*fp32", "dmean": "*fp32", "bias": "*fp32", "scale": "fp32"}
SORTING = {"expert": "*i64", "row_out": "*i64"} | dict.fromkeys(
    ("count", "total", "token", "slot", "end_out", "tile_expert", "tile_start", "used"), "*i32"
)
Work = tuple[str, ASTSource, int]


def source(kernel: Any, pointers: dict[str, str], given: dict[str, Any]) -> ASTSource:
    """A kernel for aligned tensors, the rest 32-bit integers."""
    types = {name: "constexpr" if name in given else pointers.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*") or name in ("stride", "stride_pt")
    }
    return ASTSource(kernel, types, given, aligned)


def routers(dtype: str) -> Iterator[Work]:
    """Name, source and warps of every router, forward and with all gradients that there can be."""
    values = dict.fromkeys(("logits", "prob", "score_out", "gate_out", "dgate", "dprob", "dscore", "dlogits"), f"*{dtype}")
    for name, (n_experts, rule) in ROUTERS.items():
        biased = name in BIASED
        pointers = values | OUTPUTS | {"choice_out": "*fp32" if biased else f"*{dtype}"}
        given = constants(rule, n_experts) | {"BIASED": biased}
        warps = given.pop("num_warps")
        yield f"route {name} {dtype}", source(_route, pointers, given), warps
        back = constants_backward(rule, n_experts) | {"HAS_GATE": True, "HAS_PROB": True, "HAS_SCORE": rule.score == "sigmoid", "HAS_MEAN": True}
        warps = back.pop("num_warps")
        yield f"route_backward {name} {dtype}", source(_route_backward, pointers, back), warps


def works() -> Iterator[Work]:
    """All of them."""
    for dtype in ("fp32", "bf16"):
        yield from routers(dtype)
    for n_experts in (8, 128, 1024):
        bins = triton.next_power_of_2(n_experts + 1)
        yield f"count {n_experts}", source(_count, SORTING, {"N_EXPERTS": n_experts, "BINS": bins, "BLOCK": BLOCK}), 4
        yield f"place {n_experts}", source(_place, SORTING, {"N_EXPERTS": n_experts, "TOP_K": 8, "BLOCK": BLOCK, "PART": PART}), 4
        yield f"map {n_experts}", source(_map, SORTING, {"N_EXPERTS": n_experts, "TILE_ROWS": 128, "BINS": bins, "PART": BLOCK}), 4
