"""The figures of a spec, together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spec.accounting.attention import attention_flops, mtp_attention_flops
from spec.accounting.count import count, mtp_parts, trained
from spec.accounting.memory import activation_bytes, all_to_all_bytes, kv_cache_bytes, kv_cache_bytes_per_sequence
from spec.accounting.quantity import Count
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
    """Memory on one device, and the size of a checkpoint."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
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
    experts = parts["experts"] + mtp_parts(model).get("experts", Count())
    return Price(
        total_params=total,
        mtp_params=mtp.total,
        active_params=ActiveParams(active, a1, a1 - parts["head"].active),
        flops_per_token=Flops(forward, 3 * (forward + ahead)),
        bytes=_bytes(spec, total + mtp.total, experts.total),
        tokens_per_step=spec.training.batch_size * spec.data.seq_len,
        all_to_all_bytes_per_token=all_to_all_bytes(spec),
        kv_cache_bytes_per_token=kv_cache_bytes(spec),
        kv_cache_bytes_per_sequence=kv_cache_bytes_per_sequence(spec),
        by_part={name: part.total for name, part in parts.items()},
        active_by_part={name: part.active for name, part in parts.items()},
    )


def _bytes(spec: ExperimentSpec, total: int, experts: int) -> Bytes:
    taught, taught_experts = trained(spec.model, spec.training.train)
    held, learning = _here(spec, total, experts), _here(spec, taught, taught_experts)
    weights, gradients, moments, activations = 4 * held, 4 * learning, 8 * learning, activation_bytes(spec)
    return Bytes(weights, gradients, moments, activations, weights + gradients + moments + activations, 4 * total + 8 * taught)


def _here(spec: ExperimentSpec, total: int, experts: int) -> int:
    """Of `total` parameters, `experts` of them divided over the ranks, those on one device; the others divided too where they are sharded."""
    parallel = spec.parallel
    return -(-(total - experts) // (parallel.world_size if parallel.shard else 1)) + -(-experts // parallel.expert)
