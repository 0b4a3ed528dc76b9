"""Parameters of each part of a model, all and active: the published configurations reproduce their totals exactly."""

from __future__ import annotations

from dataclasses import dataclass

from spec.attention import GroupedQueryAttention, LatentAttention
from spec.model import Model
from spec.moe import GATED

PARTS = ("embedding", "attention", "dense_ffn", "routers", "experts", "shared_experts", "norms", "head")
T5_BUCKETS = 32


@dataclass(frozen=True)
class Count:
    """Numbers in a part of the model: all of them, those that one token uses, and those of these in matrix products."""

    total: int = 0
    active: int = 0
    matmul: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.active + other.active, self.matmul + other.matmul)

    def __mul__(self, times: int) -> Count:
        return Count(self.total * times, self.active * times, self.matmul * times)

    def choose(self, k: int, of: int) -> Count:
        """`of` copies, of which a token uses `k`."""
        return Count(self.total * of, self.active * k, self.matmul * k)


def matrix(n: int) -> Count:
    """A matrix of `n` weights that every token is multiplied by."""
    return Count(n, n, n)


def vector(n: int) -> Count:
    """`n` parameters that every token uses without a matrix product: norms, biases."""
    return Count(n, n, 0)


def n_moe_layers(model: Model) -> int:
    """MoE layers of both stacks."""
    return len(model.moe_layers()) + len(model.moe_layers(model.encoder_layers))


def count(model: Model) -> dict[str, Count]:
    """The parameters of each of PARTS."""
    d, stacks = model.d_model, 2 if model.encoder_layers else 1
    layers, sparse = model.n_layers + model.encoder_layers, n_moe_layers(model)
    attentions = layers + (model.n_layers if model.encoder_layers else 0)
    attention, inner_norms = _attention(model)
    if model.position == "t5_relative":
        positions = vector(stacks * T5_BUCKETS * model.attention.n_heads)
    else:
        positions = Count()
    norm = vector(d * (2 if model.norm_bias else 1))
    norms = (layers + attentions) * (2 if model.sandwich_norm else 1) + stacks
    moe = _moe(model)
    vocabulary = model.vocab_size * d
    head = Count(0, 0, vocabulary) if model.tie_embeddings else matrix(vocabulary)
    return {
        "embedding": vector(vocabulary),
        "attention": attention * attentions + positions,
        "dense_ffn": _ffn(d, model.d_ff, model.activation) * (layers - sparse),
        **{name: part * sparse for name, part in moe.items()},
        "norms": norm * norms + inner_norms * attentions,
        "head": head + vector(model.vocab_size if model.lm_head_bias else 0),
    }


def _ffn(d: int, width: int, activation: str) -> Count:
    return matrix((3 if activation in GATED else 2) * d * width)


def _moe(model: Model) -> dict[str, Count]:
    """One MoE layer's routers, experts and shared experts."""
    moe, d = model.moe, model.d_model
    if moe is None:
        return {"routers": Count(), "experts": Count(), "shared_experts": Count()}
    activation = moe.activation or model.activation
    expert, n = _ffn(d, moe.d_expert, activation), moe.n_experts
    if moe.bias == "expert":
        expert += vector((2 if activation in GATED else 1) * moe.d_expert + d)
    experts = expert.choose(moe.top_k, n) + vector(d if moe.bias == "layer" else 0)
    shared = _ffn(d, moe.shared_width, activation) * moe.n_shared
    if moe.combine == "sigmoid_gate":
        shared += matrix(d)
    return {"routers": matrix(d * n) + vector(n if moe.router.bias else 0), "experts": experts, "shared_experts": shared}


def _attention(model: Model) -> tuple[Count, Count]:
    """One attention block, and the norms inside it."""
    if isinstance(model.attention, LatentAttention):
        return _latent(model.attention, model.d_model)
    return _grouped(model.attention, model.d_model, model.head_dim)


def _latent(attention: LatentAttention, d: int) -> tuple[Count, Count]:
    heads, rank, latent = attention.n_heads, attention.q_lora_rank, attention.kv_lora_rank
    qk = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    query = d * rank + rank * heads * qk if rank else d * heads * qk
    down = d * (latent + attention.qk_rope_head_dim)
    up = latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return matrix(query + down + up + heads * attention.v_head_dim * d), vector(rank + latent)


def _grouped(attention: GroupedQueryAttention, d: int, head_dim: int) -> tuple[Count, Count]:
    query, key = attention.n_heads * head_dim, attention.n_kv_heads * head_dim
    keys_values = matrix(2 * d * key) + vector(2 * key if attention.bias else 0)
    one = matrix(2 * d * query) + vector(query if attention.bias else 0)
    output_bias = vector(d if attention.output_bias else 0)
    sinks = vector(attention.n_heads if attention.sinks else 0)
    norms = {"none": 0, "head": 2 * head_dim, "full": query + key}[attention.qk_norm]
    if attention.experts is not None:
        n, k = attention.experts.n_experts, attention.experts.top_k
        one = one.choose(k, n) + matrix(d * n)
    return keys_values + one + output_bias + sinks, vector(norms)
