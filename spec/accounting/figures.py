"""The figures of a spec, together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spec.accounting.attention import attention_flops, mtp_attention_flops
from spec.accounting.copies import bucket_bytes, copy_bytes, held, is_cut, sharding_bytes
from spec.accounting.count import count
from spec.accounting.memory import activation_bytes, all_to_all_bytes, kv_cache_bytes, kv_cache_bytes_per_sequence
from spec.accounting.tensors import tensors
from spec.experiment import ExperimentSpec


@dataclass(frozen=True)
class ActiveParams:
    """Parameters that one token uses; which convention a publication follows, it seldom says."""

    with_embeddings: int
    without_input_embedding: int
    without_embeddings: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token."""

    forward: int
    training: int


@dataclass(frozen=True)
class Bytes:
    """Memory on one device, and the size of a checkpoint. `copies`: of weights, beside the float32 ones, while a step runs.

    `reduction`: where gradients are joined to be reduced over ranks, after the backward pass has let go of copies and activations.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    reduction: int
    total_per_device: int
    checkpoint: int


@dataclass(frozen=True)
class Price:
    """The figures of one spec.

    `by_part` and `active_by_part` have the keys PARTS; all but mtp sum to the totals. `mtp_params`, of the blocks of multi-token prediction,
    are trained and held beside total_params.
    """

    total_params: int
    mtp_params: int
    active_params: ActiveParams
    flops_per_token: Flops
    bytes: Bytes
    tokens_per_step: int
    all_to_all_bytes_per_token: int
    sharding_bytes_per_step: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes_per_sequence: int
    by_part: dict[str, int]
    active_by_part: dict[str, int]

    def model_dump(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


def price(spec: ExperimentSpec) -> Price:
    """The figures of `spec`."""
    model, parts, s = spec.model, count(spec.model), spec.data.seq_len
    mtp = parts["mtp"]
    total = sum(part.total for part in parts.values()) - mtp.total
    active = sum(part.active for part in parts.values())
    a1 = active - parts["embedding"].active
    products = sum(part.matmul for part in parts.values()) - mtp.matmul
    forward = 2 * products + attention_flops(model, s)
    ahead = 2 * (mtp.matmul + model.mtp_depth * parts["head"].matmul) + mtp_attention_flops(model, s)
    return Price(
        total_params=total,
        mtp_params=mtp.total,
        active_params=ActiveParams(active, a1, a1 - parts["head"].active),
        flops_per_token=Flops(forward, 3 * (forward + ahead)),
        bytes=_bytes(spec),
        tokens_per_step=spec.training.batch_size * spec.data.seq_len,
        all_to_all_bytes_per_token=all_to_all_bytes(spec),
        sharding_bytes_per_step=sharding_bytes(spec),
        kv_cache_bytes_per_token=kv_cache_bytes(spec),
        kv_cache_bytes_per_sequence=kv_cache_bytes_per_sequence(spec),
        by_part={name: part.total for name, part in parts.items()},
        active_by_part={name: part.active for name, part in parts.items()},
    )


def _bytes(spec: ExperimentSpec) -> Bytes:
    every = tensors(spec.model)
    taught = [tensor for tensor in every if tensor.is_trained(spec.training.train)]
    weights, learning = 4 * held(spec, every), 4 * held(spec, taught)
    moments, copies, activations, reduction = 2 * learning, copy_bytes(spec), activation_bytes(spec), bucket_bytes(spec)
    gradients = learning
    if is_cut(spec) and spec.training.grad_accumulation > 1:  # whole on every rank until the last micro-batch reduces them
        gradients = 4 * sum(tensor.over(spec.parallel.expert) if tensor.role == "expert" else tensor.size for tensor in taught)
    held_at_once = weights + gradients + moments + max(copies + activations, reduction)
    checkpoint = 4 * sum(tensor.size for tensor in every) + 8 * sum(tensor.size for tensor in taught)
    return Bytes(weights, gradients, moments, copies, activations, reduction, held_at_once, checkpoint)
