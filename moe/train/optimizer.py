"""AdamW (Loshchilov 2019) over the model's parameters, by torch's fused kernel, with its state under the parameters' names.

torch.optim.AdamW calls the same kernel, but its constructor imports torch's compiler, which costs a second and 100 MB at every start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.model import Transformer
from moe.parallel import Mesh
from moe.train import sharded
from moe.train.sharded import local
from spec.training import Optimizer


@dataclass
class Group:
    """Parameters with one decay and one factor on the learning rate."""

    weight_decay: float
    rate_factor: float
    names: list[str] = field(default_factory=list)


class AdamW:
    """Matrices are decayed, norms, biases and embeddings not; routers have a rate of their own."""

    def __init__(self, model: Transformer, spec: Optimizer, mesh: Mesh | None = None) -> None:
        """Moments of zero, float32, beside the parameters that are trained, and sharded as they are. `mesh` is the model's."""
        self.spec, self._mesh = spec, mesh
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.groups = {
            "matrix": Group(spec.weight_decay, 1.0),
            "router": Group(spec.weight_decay, spec.router_lr_factor),
            "router_plain": Group(0.0, spec.router_lr_factor),
            "plain": Group(0.0, 1.0),
        }
        routers = {id(parameter) for parameter in model.router_parameters()}
        for name, parameter in self.parameters.items():
            plain = parameter.dim() < 2 or name.startswith("embedding.") or name.endswith((".b_in", ".b_out", "bias"))
            part = ("router_plain" if plain else "router") if id(parameter) in routers else "plain" if plain else "matrix"
            self.groups[part].names.append(name)
        self._mean = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self._square = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self._steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves the parameters that have a gradient, with the schedule's `rate`."""
        self._steps += 1
        for group in self.groups.values():
            gradients = {name: gradient for name in group.names if (gradient := self.parameters[name].grad) is not None}
            names = list(gradients)
            if names:
                torch._fused_adamw_(
                    [local(self.parameters[name]) for name in names],
                    [local(gradient) for gradient in gradients.values()],
                    [local(self._mean[name]) for name in names],
                    [local(self._square[name]) for name in names],
                    [],
                    [self._steps] * len(names),
                    lr=rate * group.rate_factor,
                    beta1=self.spec.beta1,
                    beta2=self.spec.beta2,
                    weight_decay=group.weight_decay,
                    eps=self.spec.eps,
                    amsgrad=False,
                    maximize=False,
                )

    def clip(self, largest: float) -> Tensor:
        """The global gradient norm before clipping, a scalar on the device; gradients are scaled down to `largest` unless that is 0."""
        norm = sharded.total_norm(self.parameters, self._mesh)
        if largest > 0:
            sharded.scale_gradients(self.parameters.values(), norm, largest)
        return norm

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state: the moments as mean/NAME and square/NAME, and the number of steps."""
        means = {f"mean/{name}": tensor for name, tensor in self._mean.items()}
        return {**means, **{f"square/{name}": tensor for name, tensor in self._square.items()}, "steps": self._steps}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` returned. Raises KeyError or RuntimeError for another model's."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
