"""Weights spread over ranks, as the trainer sees them: gradients, their norm and checkpoints are those of one process.

Experts lie on the ranks that share them (moe.parallel). With `parallel.shard` every other weight is cut along its first dimension over all
ranks, as a DTensor, with its gradient and moments, and is whole on a rank only while its block runs (FSDP2: Zhao 2023, torch's fully_shard).
In bfloat16 a block's matrices are gathered as such, which are all that its products take; what it uses in float32 is not cut.
A checkpoint holds everything, whatever the ranks: what was saved by 2 x 1 ranks goes on with 1, 4 or 2 x 2, sharded or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.laps import Laps, together
from moe.model import Transformer
from moe.parallel import Mesh
from spec.accounting.copies import BUCKET_BYTES

_EXPERTS = ".ffn.experts."


def is_sharded(name: str) -> bool:
    """Whether the tensor of this name, or an optimiser's moment of it, has one row per expert, of which a rank holds its own."""
    return _EXPERTS in name


def shard(model: Transformer, size: int, device: torch.device, dtype: torch.dtype) -> None:
    """Cuts all weights but the experts' over the `size` ranks, in place, block by block; the rest of the model is a part of its own.

    `dtype` is that of the products. In bfloat16 routers, vectors and biases (also those with a row for each expert of queries, whose gradients add
    up tokens) stay whole beside the blocks' matrices: autocast would keep a copy of gathered float32 matrices until the backward pass. Gradients
    are added up and reduced in float32 either way. Collective. What is trained must have been chosen before.
    """
    from torch.distributed.device_mesh import init_device_mesh  # only where it is asked for: it takes long to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns of outputs that are views, which nobody may change in place: nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (size,))
    rounded = dtype != torch.float32
    exact = {id(parameter) for parameter in model.router_parameters()} if rounded else set()
    # A single number (the temperature of cosine scores) has nothing to cut: every rank has it, as without shards.
    whole = {
        parameter
        for name, parameter in model.named_parameters()
        if is_sharded(name) or parameter.dim() < 1 or id(parameter) in exact or (rounded and (parameter.dim() < 2 or name.endswith("bias")))
    }
    policy = MixedPrecisionPolicy(dtype if rounded else None, torch.float32, cast_forward_inputs=False)  # the residual stream is float32
    for block in [*model.blocks, *(ahead.block for ahead in model.mtp)]:
        fully_shard(block, mesh=mesh, ignored_params=whole, mp_policy=policy)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def reduce_in_backward(model: Transformer, *, wanted: bool) -> None:
    """Whether the next backward passes reduce the gradients of shards: only a step's last does, the others add theirs up on each rank."""
    model.set_requires_gradient_sync(wanted)  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: all of it, or its shard; of the same memory. Within no_grad."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def is_shard(tensor: Tensor) -> bool:
    """Whether `shard` has cut it (a DTensor, whose module would be slow to import for those who need none)."""
    return hasattr(tensor, "to_local")


# ----- checkpoints


def whole(tensors: Mapping[str, Tensor], mesh: Mesh | None) -> dict[str, Tensor]:
    """`tensors` with all experts and all shards on rank 0; what other ranks get is not to be used. Collective."""
    return {name: _whole(name, tensor, mesh) for name, tensor in tensors.items()}


def _whole(name: str, tensor: Tensor, mesh: Mesh | None) -> Tensor:
    if is_shard(tensor):
        gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
        return gathered.cpu() if dist.get_rank() == 0 else local(tensor.detach())  # no rank keeps more than one at a time on its device
    if mesh is None or mesh.expert == 1 or mesh.rank >= mesh.expert or not is_sharded(name):
        return tensor
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(mesh.expert)] if mesh.rank == 0 else None
    dist.gather(tensor, parts, dst=0, group=mesh.shards)
    return tensor if parts is None else torch.cat([part.cpu() for part in parts])


def own(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor], mesh: Mesh | None) -> dict[str, Tensor]:
    """Of `tensors`, which are whole, what this rank holds: as `held` is, under the same names."""
    return {name: _own(name, tensor, held.get(name), mesh) for name, tensor in tensors.items()}


def _own(name: str, tensor: Tensor, held: Tensor | None, mesh: Mesh | None) -> Tensor:
    if held is not None and is_shard(held):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, held.device_mesh, held.placements, src_data_rank=None)  # type: ignore[attr-defined]
    if mesh is None or mesh.expert == 1 or not is_sharded(name):
        return tensor
    return tensor[mesh.held(len(tensor))]


# ----- gradients


@torch.no_grad()
def average_gradients(parameters: Mapping[str, nn.Parameter], size: int, mesh: Mesh | None, laps: Laps | None = None) -> None:
    """Replaces each gradient by its mean over the `size` ranks' parts of the batch. Those of shards are that already. `laps` time a sampled step.

    Experts have theirs from the tokens of all ranks that share them already, as a sum: they lack those of their replicas.
    """
    if size == 1:
        return
    parameters = {name: parameter for name, parameter in parameters.items() if not is_shard(parameter)}
    sharded = [parameter for name, parameter in parameters.items() if mesh is not None and is_sharded(name)]
    if mesh is not None and sharded:
        _sum_over(sharded, mesh.replicas if mesh.data > 1 else None, size, laps, alone=mesh.data == 1)
    _sum_over([parameter for name, parameter in parameters.items() if mesh is None or not is_sharded(name)], None, size, laps, alone=False)


def _sum_over(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None, size: int, laps: Laps | None, *, alone: bool) -> None:
    """Reductions of gradients in the order of `parameters`, divided by `size`; `alone` where no other rank has a part of them.

    Small ones are joined in buckets, so that what lies in memory twice is bounded; one that fills a bucket is reduced where it lies.
    """
    gradients = []
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        gradients.append(parameter.grad)
    if not alone:
        _sum_in_buckets(list(buckets(gradients, BUCKET_BYTES)), group, laps)
    if gradients:
        torch._foreach_div_(gradients, size)


def _sum_in_buckets(joined: list[list[Tensor]], group: dist.ProcessGroup | None, laps: Laps | None) -> None:
    """Each bucket in the same room, which is as large as the largest; one gradient alone needs none."""
    room = None
    if numbers := [sum(map(torch.numel, bucket)) for bucket in joined if len(bucket) > 1]:
        room = joined[0][0].new_empty(max(numbers))
    for bucket in joined:
        flat = bucket[0]
        if room is not None and len(bucket) > 1:
            flat = room[: sum(map(torch.numel, bucket))]
            torch.cat([gradient.flatten() for gradient in bucket], out=flat)
        with together(laps, group):
            dist.all_reduce(flat, group=group)
        if len(bucket) > 1:
            sums = torch.split_with_sizes(flat, [gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(sums, bucket, strict=True)])


def buckets(gradients: Iterable[Tensor], limit_bytes: int) -> Iterator[list[Tensor]]:
    """Consecutive gradients together while they are of at most `limit_bytes`; a larger one alone."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.nbytes for one in bucket) + gradient.nbytes > limit_bytes:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@torch.no_grad()
def total_norm(parameters: Mapping[str, nn.Parameter], mesh: Mesh | None) -> Tensor:
    """The norm of all gradients, those of experts and shards on other ranks included; the same on every rank."""
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    experts = {} if mesh is None or mesh.expert == 1 else {name: gradient for name, gradient in gradients.items() if is_sharded(name)}
    shards = {name: local(gradient) for name, gradient in gradients.items() if is_shard(gradient)}
    here = nn.utils.get_total_norm([gradient for name, gradient in gradients.items() if name not in experts and name not in shards])
    if mesh is not None and experts:
        here = _joined(here, experts, mesh.shards)
    return _joined(here, shards, None) if shards else here


def _joined(norm: Tensor, gradients: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """The norm of what `norm` is the norm of and of `gradients` on all ranks of the group."""
    square = nn.utils.get_total_norm(list(gradients.values())).square()
    dist.all_reduce(square, group=group)
    return (square + norm.square()).sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float) -> None:
    """Scales gradients whose norm is `norm` down to `largest`, as torch's clip_grads_with_norm_ does."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
