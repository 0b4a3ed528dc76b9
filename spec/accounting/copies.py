"""What a training step holds and sends of weights and gradients beside the float32 ones: copies for its products, what is gathered, what is joined.

With `parallel.shard` each tensor is cut into equal numbers of whole rows; the last ranks' are filled up, held and sent all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spec.accounting.count import n_moe_layers, n_mtp_moe_layers
from spec.accounting.tensors import Tensor, block, tensors
from spec.experiment import ExperimentSpec
from spec.model import Model

FLOAT32, BFLOAT16 = 4, 2
BUCKET_BYTES = 25 * 2**20
"""Gradients are joined in buffers of at most this size for their reduction; larger ones are reduced where they lie."""


def copy_bytes(spec: ExperimentSpec) -> int:
    """What one device holds of weights beside the float32 ones when a forward pass ends; an estimate.

    In bfloat16 the experts' matrices are cast once a step, and autocast keeps its copies of the others until the backward pass has used them.
    With `parallel.shard` the weights outside the blocks, with their gradients, are whole meanwhile, and those of one block, which bfloat16
    gathers as such without a copy.
    """
    rounded = spec.training.precision == "bfloat16"
    matrices = [tensor for tensor in tensors(spec.model) if tensor.matrix and tensor.role != "router"]
    experts = _size(tensor for tensor in matrices if tensor.role == "expert")
    head = spec.model.vocab_size * spec.model.d_model + _size(tensor for tensor in matrices if tensor.part == "mtp")
    copies = BFLOAT16 * (-(-experts // spec.parallel.expert) + head) if rounded else 0
    if not is_cut(spec):
        return copies + (BFLOAT16 * _size(tensor for tensor in matrices if tensor.in_block and not tensor.role) if rounded else 0)
    ranks = spec.parallel.world_size
    outside = [tensor for tensor in cut(spec, tensors(spec.model)) if not tensor.in_block]
    blocks = [cut(spec, block(spec.model, sparse=sparse)) for sparse in _kinds(spec.model)]
    gathered = max(spec.training.product_bytes * ranks * _over(one, ranks) + FLOAT32 * _size(one) for one in blocks)
    return copies + FLOAT32 * (ranks * _over(outside, ranks) + _size(outside)) + gathered


def bucket_bytes(spec: ExperimentSpec) -> int:
    """The most that one device holds of gradients a second time, to reduce them over ranks together: after the backward pass.

    Those of shards are reduced within it; those of experts that ranks share go apart, to the ranks that hold the same ones, where there are any.
    """
    if spec.parallel.world_size == 1:
        return 0
    taught = [tensor for tensor in tensors(spec.model) if tensor.is_trained(spec.training.train)]
    cut_ones = set(cut(spec, taught))
    experts = sum(FLOAT32 * tensor.size // spec.parallel.expert for tensor in taught if tensor.role == "expert")
    rest = FLOAT32 * _size(tensor for tensor in taught if tensor.role != "expert" and tensor not in cut_ones)
    if spec.parallel.expert == 1:
        return min(BUCKET_BYTES, rest + experts)
    return min(BUCKET_BYTES, max(rest, experts if spec.parallel.data > 1 else 0))


def sharding_bytes(spec: ExperimentSpec) -> int:
    """Bytes that leave a device in a step for gathering weights that are cut and reducing their gradients; 0 where none are.

    Rings: each rank passes on the rows of all others but one. A micro-batch gathers blocks for its forward and its backward pass, in the
    products' precision, the rest once, in float32; a step reduces once, in float32.
    """
    if not is_cut(spec):
        return 0
    ranks, training = spec.parallel.world_size, spec.training
    every = cut(spec, tensors(spec.model))
    blocks, outside = (_over([tensor for tensor in every if tensor.in_block == inside], ranks) for inside in (True, False))
    gathered = training.grad_accumulation * (2 * training.product_bytes * blocks + FLOAT32 * outside)
    reduced = FLOAT32 * _over([tensor for tensor in every if tensor.is_trained(training.train)], ranks)
    return (gathered + reduced) * (ranks - 1)


# ----- what is cut


def is_cut(spec: ExperimentSpec) -> bool:
    """Whether the ranks hold parts of the weights that are not experts'."""
    return spec.parallel.shard and spec.parallel.world_size > 1


def cut(spec: ExperimentSpec, some: Iterable[Tensor]) -> list[Tensor]:
    """Which of `some` tensors the ranks hold rows of: neither experts nor single numbers, and in bfloat16 matrices alone, but for routers'."""
    if not is_cut(spec):
        return []
    rounded = spec.training.precision == "bfloat16"
    kept = (tensor for tensor in some if tensor.role != "expert" and tensor.rows)
    return [tensor for tensor in kept if not rounded or (tensor.matrix and tensor.role != "router")]


def held(spec: ExperimentSpec, some: Iterable[Tensor]) -> int:
    """Numbers of `some` tensors on the fullest device."""
    some = list(some)
    cut_ones = set(cut(spec, some))
    total = 0
    for tensor in some:
        ranks = spec.parallel.expert if tensor.role == "expert" else spec.parallel.world_size if tensor in cut_ones else 1
        total += tensor.over(ranks)
    return total


def _kinds(model: Model) -> set[bool]:
    """Whether there are sparse blocks, dense ones, or both."""
    blocks, sparse = model.n_layers + model.encoder_layers + model.mtp_depth, n_moe_layers(model) + n_mtp_moe_layers(model)
    return {kind for kind, some in ((True, sparse), (False, blocks - sparse)) if some}


def _size(some: Iterable[Tensor]) -> int:
    return sum(tensor.size for tensor in some)


def _over(some: Sequence[Tensor], ranks: int) -> int:
    return sum(tensor.over(ranks) for tensor in some)
