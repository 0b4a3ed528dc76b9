"""Watches the routers of a Hugging Face MoE, so that any training loop can record its routing.

    from moelab import Recorder, attach

    routing = attach(model)                                    # Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3, gpt-oss, …
    with Recorder("fine-tune", **routing.shape) as recorder:
        for step, batch in enumerate(loader, 1):
            ...
            recorder.log(step, {"loss": loss.item()}, **routing.take())

A router is a module whose class is called …Router, with `num_experts` and `top_k`, which returns the chosen experts' indices
among its outputs: so transformers builds them (5.x). Counts stay on the device until `take`.
"""

from __future__ import annotations

import re
import sys
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray


class Shape(TypedDict):
    """What a Recorder has to know about the model."""

    moe_layers: list[int]
    n_experts: int
    top_k: int


class Taken(TypedDict):
    """Tensors of one step."""

    expert_tokens: NDArray[np.uint32]


class Routing:
    """Counts of tokens per layer and expert since the last `take`."""

    def __init__(self, routers: dict[int, Any]) -> None:
        """`routers` by the index of their layer in the model."""
        self._routers = dict(sorted(routers.items()))
        first = next(iter(self._routers.values()))
        self.shape = Shape(moe_layers=list(self._routers), n_experts=int(first.num_experts), top_k=int(first.top_k))
        self._counts: dict[int, Any] = {}
        self._handles = [router.register_forward_hook(self._hook(layer)) for layer, router in self._routers.items()]

    def take(self) -> Taken:
        """Tokens routed to each expert [layer, expert] in the training forwards since the last call, and begins anew."""
        zeros = np.zeros(self.shape["n_experts"], np.uint32)
        rows = [self._counts[layer].cpu().numpy().astype(np.uint32) if layer in self._counts else zeros for layer in self._routers]
        self._counts.clear()
        return Taken(expert_tokens=np.stack(rows))

    def detach(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def count(module: Any, inputs: Any, outputs: Any) -> None:
            if not module.training or _in_backward():
                return
            indices = next(out for out in outputs if not out.is_floating_point() and out.shape[-1] == module.top_k)
            counts = indices.detach().flatten().bincount(minlength=module.num_experts)
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

        return count


def attach(model: Any) -> Routing:
    """Finds the routers of `model`, a torch module, and watches them. Raises ValueError where there are none, or of different sizes."""
    routers = {}
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", f".{name}.")
        if type(module).__name__.endswith("Router") and hasattr(module, "num_experts") and hasattr(module, "top_k") and layer:
            routers[int(layer[1])] = module
    if not routers:
        raise ValueError("no router found: expected modules called …Router with num_experts and top_k, inside numbered layers")
    sizes = {(int(router.num_experts), int(router.top_k)) for router in routers.values()}
    if len(sizes) > 1:
        raise ValueError(f"the layers differ in (num_experts, top_k): {sorted(sizes)}")
    return Routing(routers)


def _in_backward() -> bool:
    """Whether this forward is the recomputation of a checkpointed one, which has been counted already."""
    torch = sys.modules["torch"]
    return bool(torch._C._current_graph_task_id() != -1)
