"""Experts spread over ranks, as the trainer sees them: gradients, their norm and checkpoints are those of one process.

A checkpoint holds every expert, whatever the ranks: what was saved by 2 x 1 ranks goes on with 1, 4 or 2 x 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.laps import Laps, together
from moe.parallel import Mesh

_EXPERTS = ".ffn.experts."


def is_sharded(name: str) -> bool:
    """Whether the tensor of this name, or an optimiser's moment of it, has one row per expert, of which a rank holds its own."""
    return _EXPERTS in name


def whole(tensors: Mapping[str, Tensor], mesh: Mesh | None) -> dict[str, Tensor]:
    """`tensors` with all experts on rank 0; what other ranks get is not to be used. Collective over the first replica."""
    if mesh is None or mesh.expert == 1 or mesh.rank >= mesh.expert:
        return dict(tensors)
    return {name: _gathered(tensor, mesh) if is_sharded(name) else tensor for name, tensor in tensors.items()}


def _gathered(tensor: Tensor, mesh: Mesh) -> Tensor:
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(mesh.expert)] if mesh.rank == 0 else None
    dist.gather(tensor, parts, dst=0, group=mesh.shards)
    return tensor if parts is None else torch.cat(parts)


def own(tensors: Mapping[str, Tensor], mesh: Mesh | None) -> dict[str, Tensor]:
    """Of `tensors` with all experts, what this rank holds."""
    if mesh is None or mesh.expert == 1:
        return dict(tensors)
    return {name: tensor[mesh.held(len(tensor))] if is_sharded(name) else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def average_gradients(parameters: Mapping[str, nn.Parameter], size: int, mesh: Mesh | None, laps: Laps | None = None) -> None:
    """Replaces each gradient by its mean over the `size` ranks' parts of the batch. `laps` time a sampled step.

    Experts have theirs from the tokens of all ranks that share them already, as a sum: they lack those of their replicas.
    """
    if size == 1:
        return
    sharded = [parameter for name, parameter in parameters.items() if mesh is not None and is_sharded(name)]
    if mesh is not None and sharded:
        _sum_over(sharded, mesh.replicas if mesh.data > 1 else None, size, laps, alone=mesh.data == 1)
    _sum_over([parameter for name, parameter in parameters.items() if mesh is None or not is_sharded(name)], None, size, laps, alone=False)


def _sum_over(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None, size: int, laps: Laps | None, *, alone: bool) -> None:
    """One reduction of one flat buffer, divided by `size`; `alone` where no other rank has a part of it."""
    parameters = list(parameters)
    if not parameters:  # all that is trained lies on the other side
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if not alone:
        with together(laps, group):
            dist.all_reduce(flat, group=group)
    flat /= size
    means = torch.split_with_sizes(flat, [gradient.numel() for gradient in gradients])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter)


@torch.no_grad()
def total_norm(parameters: Mapping[str, nn.Parameter], mesh: Mesh | None) -> Tensor:
    """The norm of all gradients, those of experts on other ranks included; the same on every rank."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    if mesh is None or mesh.expert == 1:
        return nn.utils.get_total_norm(list(gradients.values()))
    mine = [gradient for name, gradient in gradients.items() if is_sharded(name)]
    here = (nn.utils.get_total_norm(mine) if mine else next(iter(parameters.values())).new_zeros(())).square()
    dist.all_reduce(here, group=mesh.shards)
    everywhere = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if not is_sharded(name)])
    return (here + everywhere.square()).sqrt()
