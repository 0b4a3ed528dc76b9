"""Upcycling: the feed-forward layers of a dense model become the experts of a Mixture of Experts (Komatsuzaki 2022; granular: He 2024).

The dense layer's hidden units are divided in order: the shared experts take the first of them, the rest is cut into g slices, and expert
c * g + i of an MoE layer is slice i of copy c. A gated expert with gates that sum to s = `router.scale` over k chosen slices of whole
copies returns s / g of the dense layer's output; its down-projection is therefore multiplied by g / s, so that the first step's output
is the dense model's where the gates are normalised, and no noise was asked for. For whole copies to be chosen, the g experts of one copy
begin with the same router weights ("virtual groups").

Letters: E experts, C copies, G slices of each, F hidden units of one expert, W hidden units of the dense layer, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.activation import GATED
from moe.layer import MoeLayer
from moe.model import Transformer
from spec.start import Upcycle


@torch.no_grad()
def upcycle(dense: Mapping[str, Tensor], model: Transformer, start: Upcycle, seed: int) -> int:
    """Fills `model` from the tensors of a dense model, all but the routers; returns how many layers became MoE layers.

    Raises ValueError where a tensor is missing, left over or of another shape.
    """
    noise = torch.Generator().manual_seed(seed)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoeLayer)}
    left = set(dense)
    for name, layer in layers.items():
        w_in, w_out = _taken(dense, f"{name}.w_in", left), _taken(dense, f"{name}.w_out", left)
        _fill(layer, w_in, w_out, start, noise)
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            source = _taken(dense, name, left)
            if source.shape != tensor.shape:
                raise ValueError(f"{name} is {list(source.shape)}, but model needs {list(tensor.shape)}")
            tensor.copy_(source)
    if left:
        raise ValueError(f"model has no place for {min(left)}" + (f" and {len(left) - 1} more" if len(left) > 1 else ""))
    return len(layers)


def _taken(dense: Mapping[str, Tensor], name: str, left: set[str]) -> Tensor:
    if name not in dense:
        raise ValueError(f"it has no {name}")
    left.discard(name)
    return dense[name]


def _fill(layer: MoeLayer, w_in_HD: Tensor, w_out_DW: Tensor, start: Upcycle, noise: torch.Generator) -> None:
    """The experts and shared experts of one MoE layer from a dense layer's matrices; H = 2 W if gated (gate rows first), else W."""
    moe, slices = layer.spec, start.granularity
    shared, width = moe.n_shared * moe.shared_width, w_out_DW.shape[1]
    parts = 2 if layer.experts.activation in GATED else 1
    if slices * moe.d_expert + shared != width or w_in_HD.shape != (parts * width, layer.experts.w_in.shape[2]):
        wanted = f"start.granularity {slices} x model.moe.d_expert {moe.d_expert} + {shared} shared"
        raise ValueError(f"a dense layer of {list(w_in_HD.shape)} and {list(w_out_DW.shape)} is not cut into {wanted} hidden units")
    w_in_PWD = w_in_HD.unflatten(0, (parts, width))
    if layer.shared is not None:
        layer.shared.w_in.copy_(w_in_PWD[:, :shared].flatten(0, 1))
        layer.shared.w_out.copy_(w_out_DW[:, :shared])
    w_in_GHD = w_in_PWD[:, shared:].unflatten(1, (slices, moe.d_expert)).transpose(0, 1).flatten(1, 2)
    w_out_GDF = w_out_DW[:, shared:].unflatten(1, (slices, moe.d_expert)).transpose(0, 1) * (slices / moe.router.scale)
    copies = moe.n_experts // slices
    layer.experts.w_in.copy_(w_in_GHD.repeat(copies, 1, 1))
    layer.experts.w_out.copy_(w_out_GDF.repeat(copies, 1, 1))
    if start.noise_std:
        _perturb(layer.experts.w_in, layer.experts.w_out, parts, start, noise)
    if slices > 1:
        _tie(layer.router, moe.n_experts, slices)


def _perturb(w_in_EHD: Tensor, w_out_EDF: Tensor, parts: int, start: Upcycle, noise: torch.Generator) -> None:
    """Normal noise on a drawn share of each expert's hidden units, relative to the matrix's standard deviation; another for each expert."""
    width = w_out_EDF.shape[2]
    drawn = max(1, round(start.noise_share * width))
    for w_in_HD, w_out_DF in zip(w_in_EHD, w_out_EDF, strict=True):
        units = torch.randperm(width, generator=noise)[:drawn]
        rows = torch.cat([units + part * width for part in range(parts)])
        for matrix, dim, index in ((w_in_HD, 0, rows), (w_out_DF, 1, units)):
            std = start.noise_std * float(matrix.std(correction=0))
            shape = [len(index), matrix.shape[1]] if dim == 0 else [matrix.shape[0], len(index)]
            change = torch.randn(shape, generator=noise).mul_(std)
            matrix.index_add_(dim, index.to(matrix.device), change.to(matrix))


def _tie(router: nn.Module, n_experts: int, slices: int) -> None:
    """Gives the experts of one copy the router weights of its first."""
    for parameter in router.parameters(recurse=False):
        if parameter.dim() and parameter.shape[0] == n_experts:
            grouped = parameter.unflatten(0, (n_experts // slices, slices))
            grouped.copy_(grouped[:, :1].expand_as(grouped).clone())
