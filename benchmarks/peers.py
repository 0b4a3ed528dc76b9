"""Other implementations of a whole MoE layer, to be measured beside ours: each where it is installed, called as its own documentation does.

Every one gets the layer's own tensors: x [T, D], w_in [E, 2F, D] with gate rows first, w_out [E, D, F]. All but SonicMoE take the experts and gates
of `Layer.route`; SonicMoE routes itself (top-k of the scores, then softmax) and reads gate and up rows as alternating: other numbers,
the same work.
"""

# ruff: noqa: N806 - names of tensors carry their shape
from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.activation import hidden

if TYPE_CHECKING:
    from benchmarks.kernels import Layer


Run = Callable[["Layer"], Tensor]


def transformers_grouped_mm(layer: Layer) -> Tensor:
    """transformers' experts of Qwen3-MoE with `experts_implementation="grouped_mm"`."""
    expert_TK, gate_TK = layer.route()
    weights = {"gate_up_proj": layer.w_in_EHD, "down_proj": layer.w_out_EDF}
    module = _transformers_experts(*layer.w_out_EDF.shape)
    y_TD: Tensor = torch.func.functional_call(module, weights, (layer.x_TD, expert_TK, gate_TK.to(layer.x_TD.dtype)))
    return y_TD


@cache
def _transformers_experts(n_experts: int, width: int, expert_width: int) -> Any:
    """Without weights of its own."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(num_experts=n_experts, hidden_size=width, moe_intermediate_size=expert_width, hidden_act="silu")
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return Qwen3MoeExperts(config)  # type: ignore[no-untyped-call]


def scattermoe(layer: Layer) -> Tensor:
    """ScatterMoE's two scattered products with SwiGLU between them."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    expert_TK, gate_TK = layer.route()
    sorting = flatten_sort_count(expert_TK, num_experts=len(layer.w_in_EHD))
    h_RH = parallel_linear(layer.x_TD, layer.w_in_EHD.permute(0, 2, 1), layer.top_k, *sorting, grouped_out=True)
    gate = gate_TK.to(layer.x_TD.dtype)
    y_TD: Tensor = parallel_linear(hidden(h_RH, "swiglu"), layer.w_out_EDF.permute(0, 2, 1), 1, *sorting, grouped_in=True, gates=gate)
    return y_TD


def liger(layer: Layer) -> Tensor:
    """Liger's fused MoE."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    expert_TK, gate_TK = layer.route()
    y_TD: Tensor = LigerFusedMoEFunction.apply(layer.x_TD, layer.w_in_EHD, layer.w_out_EDF, expert_TK.int(), gate_TK)
    return y_TD


def sonicmoe(layer: Layer) -> Tensor:
    """SonicMoE with its own router."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    w_in_HDE, w_out_DFE = layer.w_in_EHD.permute(1, 2, 0), layer.w_out_EDF.permute(1, 2, 0)
    stream, training = torch.cuda.current_stream().cuda_stream, torch.is_grad_enabled()
    y_TD: Tensor = moe_TC_softmax_topk_layer(
        layer.x_TD, layer.w_router_ED, w_in_HDE, None, w_out_DFE, None, layer.top_k, stream, ActivationType.SWIGLU, not training
    )[0]
    return y_TD


PEERS: dict[str, tuple[str, Run]] = {
    "transformers grouped_mm": ("transformers.models.qwen3_moe.modeling_qwen3_moe", transformers_grouped_mm),
    "scattermoe": ("scattermoe.parallel_experts", scattermoe),
    "liger": ("liger_kernel.ops.fused_moe", liger),
    "sonicmoe": ("sonicmoe.functional", sonicmoe),
}


def installed() -> tuple[dict[str, Run], dict[str, str]]:
    """Name to how it runs, for those that can be imported; and why not, for the others."""
    found: dict[str, Run] = {}
    absent: dict[str, str] = {}
    for name, (module, run) in PEERS.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            absent[name] = "not installed" if error.name and module.startswith(error.name) else f"needs {error.name}"
        except Exception as error:  # what a foreign package does when it is imported is its own
            absent[name] = f"cannot be imported: {type(error).__name__}: {error}"[:200]
        else:
            found[name] = run
    return found, absent
