"""What a training step holds and sends of weights beside the float32 ones: copies for its products, and with `parallel.shard` what is gathered.

Vectors (norms, biases), a few thousandths of the rest, are counted with the matrices that they go with.
"""

from __future__ import annotations

from dataclasses import dataclass

from spec.accounting.attention import attention_counts, attention_router
from spec.accounting.count import count, layer_parts, mtp_parts, n_attentions, trained
from spec.accounting.quantity import Count
from spec.experiment import ExperimentSpec
from spec.model import Model

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class Weights:
    """Matrices by what a step does with them. `products`: not experts' nor routers', in the blocks; `head`: in products beyond these."""

    experts: int
    products: int
    head: int
    outside: int  # all that lies outside the blocks, which is gathered for the whole of a micro-batch
    widest: int  # products' of the largest block
    routers: int

    @classmethod
    def of(cls, model: Model) -> Weights:
        """Of `model`, its blocks of multi-token prediction among the blocks."""
        parts, ahead, none = count(model), mtp_parts(model), Count()
        both = {name: parts[name] + ahead.get(name, none) for name in ("attention", "dense_ffn", "shared_experts", "experts", "routers")}
        routers = attention_router(model) * (n_attentions(model) + model.mtp_depth)
        one = layer_parts(model)
        attention = _matrices(attention_counts(model, 1, last=True)[0]) - attention_router(model)
        return cls(
            experts=_matrices(both["experts"]),
            products=sum(_matrices(both[name]) for name in ("attention", "dense_ffn", "shared_experts")) - routers,
            head=_matrices(parts["head"]) + _matrices(ahead.get("projection", none)),
            outside=parts["embedding"].total + parts["head"].total + ahead.get("projection", none).total,
            widest=attention + max(_matrices(one["dense_ffn"]), _matrices(one["shared_experts"])),
            routers=both["routers"].total + routers,
        )


def _matrices(part: Count) -> int:
    """All numbers in matrices that products take; of a tied head, those that it borrows."""
    return part.total * part.matmul // part.active if part.active else part.matmul


def copy_bytes(spec: ExperimentSpec) -> int:
    """What one device holds of weights beside the float32 ones when a forward pass ends; an estimate.

    In bfloat16 the experts' matrices are cast once a step, and autocast keeps its copies of the others until the backward pass has used them.
    With `parallel.shard` the weights outside the blocks, with their gradients, are whole meanwhile, and those of one block, which bfloat16
    gathers as such without a copy.
    """
    weights, rounded = Weights.of(spec.model), spec.training.precision == "bfloat16"
    copies = BFLOAT16 * (-(-weights.experts // spec.parallel.expert) + weights.head) if rounded else 0
    if not is_cut(spec):
        return copies + (BFLOAT16 * weights.products if rounded else 0)
    return copies + 2 * FLOAT32 * weights.outside + (spec.training.product_bytes + FLOAT32) * weights.widest


def sharding_bytes(spec: ExperimentSpec) -> int:
    """Bytes that leave a device in a step for gathering weights that are cut and reducing their gradients; 0 where none are.

    Rings: each rank passes on (ranks - 1) / ranks of the whole. A micro-batch gathers blocks for its forward and its backward pass, in the
    products' precision, the rest once, in float32; a step reduces once, in float32. Routers of a bfloat16 run are not cut.
    """
    if not is_cut(spec):
        return 0
    weights, ranks, training = Weights.of(spec.model), spec.parallel.world_size, spec.training
    taught = trained(spec.model, training.train)
    whole = training.precision == "bfloat16"
    blocks = weights.products + (0 if whole else weights.routers)
    gathered = training.grad_accumulation * (2 * training.product_bytes * blocks + FLOAT32 * weights.outside)
    reduced = FLOAT32 * (taught.total - taught.experts - (taught.routers if whole else 0))
    return (gathered + reduced) * (ranks - 1) // ranks


def is_cut(spec: ExperimentSpec) -> bool:
    """Whether the ranks hold parts of the weights that are not experts'."""
    return spec.parallel.shard and spec.parallel.world_size > 1
