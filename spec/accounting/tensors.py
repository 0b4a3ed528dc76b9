"""The tensors of a model by their shapes: what ranks cut by rows is held and sent in whole rows.

The trainer's modules hold the same ones (tests/spec/test_model_agrees.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from spec.accounting.attention import softmax_blocks
from spec.accounting.count import T5_BUCKETS, n_attentions, n_moe_layers, n_mtp_moe_layers
from spec.attention import GroupedQueryAttention, LatentAttention, LightningAttention
from spec.model import Model
from spec.moe import GATED

_MOE_PARTS = ("routers", "experts", "shared_experts")


@dataclass(frozen=True)
class Tensor:
    """`times` tensors of `rows` rows of `width` numbers, in `part` (of count.PARTS). A single number has 0 rows."""

    part: str
    rows: int
    width: int = 1
    matrix: bool = True  # that products take, or the embedding
    role: Literal["", "router", "expert"] = ""
    in_block: bool = True
    times: int = 1

    @property
    def size(self) -> int:
        """Numbers in all of them."""
        return max(self.rows, 1) * self.width * self.times

    def over(self, ranks: int) -> int:
        """Numbers that the fullest of `ranks` ranks holds, which has whole rows; the others are padded to as many."""
        return -(-max(self.rows, 1) // ranks) * self.width * self.times

    def is_trained(self, train: str) -> bool:
        """Whether `training.train` has it trained."""
        if train == "only_router":
            return self.role == "router"
        return train == "all" or (self.part in _MOE_PARTS) == (train == "only_moe")


def tensors(model: Model) -> list[Tensor]:
    """All parameters, those of multi-token prediction among them."""
    d, layers, depth = model.d_model, model.n_layers + model.encoder_layers, model.mtp_depth
    sparse, stacks = n_moe_layers(model) + n_mtp_moe_layers(model), 2 if model.encoder_layers else 1
    attentions = n_attentions(model) + depth
    norms = (layers + depth + attentions) * (2 if model.sandwich_norm else 1)
    found: list[Tensor] = [*_attention(model), *_times(_moe(model), sparse), *_times(_norm(model), norms)]
    if sparse < layers + depth:
        found += _times(_feed_forward("dense_ffn", d, model.d_ff, model.activation), layers + depth - sparse)
    outside = [Tensor("embedding", model.vocab_size, d), *_times(_norm(model), stacks + 3 * depth)]
    outside += [] if model.tie_embeddings else [Tensor("head", model.vocab_size, d)]
    outside += [Tensor("head", model.vocab_size, matrix=False)] if model.lm_head_bias else []
    outside += [Tensor("mtp", d, 2 * d, times=depth)] if depth else []
    if model.position == "t5_relative":
        outside.append(Tensor("attention", T5_BUCKETS, model.attention.n_heads, matrix=False, times=stacks))
    return found + [replace(tensor, in_block=False) for tensor in outside]


def block(model: Model, *, sparse: bool) -> list[Tensor]:
    """One block of the last layer's attention, MoE or dense."""
    feed_forward = _moe(model) if sparse else _feed_forward("dense_ffn", model.d_model, model.d_ff, model.activation)
    return [*_last_attention(model), *feed_forward, *_times(_norm(model), 4 if model.sandwich_norm else 2)]


def _times(some: Iterator[Tensor], times: int) -> list[Tensor]:
    return [replace(tensor, times=times * tensor.times) for tensor in some] if times else []


def _norm(model: Model) -> Iterator[Tensor]:
    yield Tensor("norms", model.d_model, matrix=False, times=2 if model.norm_bias else 1)


def _feed_forward(part: str, d: int, width: int, activation: str) -> Iterator[Tensor]:
    yield Tensor(part, (2 if activation in GATED else 1) * width, d)
    yield Tensor(part, d, width)


def _moe(model: Model) -> Iterator[Tensor]:
    """One MoE layer's router, experts and shared experts, which are one wide feed-forward layer."""
    moe, d = model.moe, model.d_model
    if moe is None:
        return
    router, n, activation = moe.router, moe.n_experts, moe.activation or model.activation
    if router.traits.learned:
        width = d if router.scorer == "linear" else router.scorer_dim
        yield Tensor("routers", n, width, role="router")
        if router.scorer != "linear":
            yield Tensor("routers", width, d, role="router")
        if router.scorer == "cosine":
            yield Tensor("routers", 0, matrix=False, role="router")
        if router.kind == "noisy_topk":
            yield Tensor("routers", n, d, role="router")
        if router.bias:
            yield Tensor("routers", n, matrix=False, role="router")
    rows = (2 if activation in GATED else 1) * moe.d_expert
    yield Tensor("experts", n, rows * d, role="expert")
    yield Tensor("experts", n, d * moe.d_expert, role="expert")
    if moe.bias == "expert":
        yield Tensor("experts", n, rows, matrix=False, role="expert")
        yield Tensor("experts", n, d, matrix=False, role="expert")
    if moe.bias == "layer":
        yield Tensor("experts", d, matrix=False)
    if moe.n_shared:
        yield from _feed_forward("shared_experts", d, moe.n_shared * moe.shared_width, activation)
    if moe.combine == "sigmoid_gate":
        yield Tensor("shared_experts", 1, d)
    if moe.combine == "residual":
        yield Tensor("shared_experts", 2, d)
        yield Tensor("shared_experts", 2, matrix=False)


# ----- attention


def _attention(model: Model) -> list[Tensor]:
    """Of all layers, and of the blocks of multi-token prediction."""
    attention, blocks, depth = model.attention, n_attentions(model), model.mtp_depth
    if not isinstance(attention, LightningAttention):
        return _times(_last_attention(model), blocks + depth)
    softmax = softmax_blocks(attention, model, blocks) + softmax_blocks(attention, model, depth, last=True)
    return _times(_softmax(attention, model.d_model), softmax) + _times(_lightning(attention, model.d_model), blocks + depth - softmax)


def _last_attention(model: Model) -> Iterator[Tensor]:
    attention, d = model.attention, model.d_model
    if isinstance(attention, LatentAttention):
        return _latent(attention, d)
    if isinstance(attention, GroupedQueryAttention):
        return _grouped(attention, d, model.head_dim)
    return (_softmax if attention.softmax_at(model.n_layers - 1) else _lightning)(attention, d)


def _latent(attention: LatentAttention, d: int) -> Iterator[Tensor]:
    heads, rank, latent = attention.n_heads, attention.q_lora_rank, attention.kv_lora_rank
    if rank:
        yield Tensor("attention", rank, d)
        yield Tensor("norms", rank, matrix=False)
    yield Tensor("attention", heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim), rank or d)
    yield Tensor("attention", latent + attention.qk_rope_head_dim, d)
    yield Tensor("norms", latent, matrix=False)
    yield Tensor("attention", heads * (attention.qk_nope_head_dim + attention.v_head_dim), latent)
    yield Tensor("attention", d, heads * attention.v_head_dim)


def _grouped(attention: GroupedQueryAttention, d: int, head_dim: int) -> Iterator[Tensor]:
    query, keys_values, experts = attention.n_heads * head_dim, 2 * attention.n_kv_heads * head_dim, attention.experts
    if experts is None:
        yield Tensor("attention", query + keys_values, d)
        yield Tensor("attention", d, query)
    else:
        yield Tensor("attention", experts.n_experts, d, role="router")
        yield Tensor("attention", experts.n_experts, query * d, times=2)
        yield Tensor("attention", keys_values, d)
    if attention.bias:
        yield Tensor("attention", keys_values + (0 if experts else query), matrix=False)
        if experts:
            yield Tensor("attention", experts.n_experts, query, matrix=False)
    if attention.output_bias:
        yield Tensor("attention", d, matrix=False)
    if attention.sinks:
        yield Tensor("attention", attention.n_heads, matrix=False)
    if attention.qk_norm in ("head", "full"):
        for width in (head_dim, head_dim) if attention.qk_norm == "head" else (query, keys_values // 2):
            yield Tensor("norms", width, matrix=False)


def _softmax(attention: LightningAttention, d: int) -> Iterator[Tensor]:
    query = attention.n_heads * attention.head_dim
    yield Tensor("attention", query + 2 * attention.n_kv_heads * attention.head_dim, d)
    yield Tensor("attention", d, query)


def _lightning(attention: LightningAttention, d: int) -> Iterator[Tensor]:
    width = attention.n_heads * attention.head_dim
    yield Tensor("attention", width, d, times=4)
    yield Tensor("attention", d, width)
    yield Tensor("norms", width, matrix=False)
