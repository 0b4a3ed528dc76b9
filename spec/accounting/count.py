"""Parameters of each part of a model, all and active: the published configurations reproduce their totals exactly."""

from __future__ import annotations

from spec.accounting.attention import attention_counts
from spec.accounting.quantity import Count, matrix, vector
from spec.model import Model
from spec.moe import GATED, Moe

# What multi-token prediction adds is the last: no total of parameters contains it, as in publications.
PARTS = ("embedding", "attention", "dense_ffn", "routers", "experts", "shared_experts", "norms", "head", "mtp")
T5_BUCKETS = 32


def n_moe_layers(model: Model) -> int:
    """MoE layers of both stacks, without those of multi-token prediction."""
    return len(model.moe_layers()) + len(model.moe_layers(model.encoder_layers))


def n_attentions(model: Model) -> int:
    """Attention blocks of both stacks, cross-attention among them, without those of multi-token prediction."""
    return model.n_layers + model.encoder_layers + (model.n_layers if model.encoder_layers else 0)


def n_mtp_moe_layers(model: Model) -> int:
    """MoE layers of the blocks of multi-token prediction, which are of the last layer's kind."""
    return model.mtp_depth if model.n_layers - 1 in model.moe_layers() else 0


def count(model: Model) -> dict[str, Count]:
    """The parameters of each of PARTS. A token uses those of mtp in training alone: none are active."""
    d, stacks = model.d_model, 2 if model.encoder_layers else 1
    layers, sparse = model.n_layers + model.encoder_layers, n_moe_layers(model)
    attentions = n_attentions(model)
    attention, inner_norms = attention_counts(model, attentions)
    if model.position == "t5_relative":
        positions = vector(stacks * T5_BUCKETS * model.attention.n_heads)
    else:
        positions = Count()
    norms = (layers + attentions) * (2 if model.sandwich_norm else 1) + stacks
    vocabulary = model.vocab_size * d
    head = Count(0, 0, vocabulary) if model.tie_embeddings else matrix(vocabulary)
    mtp = sum(mtp_parts(model).values(), Count())
    return {
        "embedding": vector(vocabulary),
        "attention": attention + positions,
        "dense_ffn": _ffn(d, model.d_ff, model.activation) * (layers - sparse),
        **{name: part * sparse for name, part in _moe(model).items()},
        "norms": _norm(model) * norms + inner_norms,
        "head": head + vector(model.vocab_size if model.lm_head_bias else 0),
        "mtp": Count(mtp.total, 0, mtp.matmul),
    }


def mtp_parts(model: Model) -> dict[str, Count]:
    """All blocks of multi-token prediction by kind of parameter, under the names of PARTS (DeepSeek-V3, section 2.2).

    Each has a projection of two vectors to one, a norm for either and one before the head, and a block of the last layer's kind. Embedding
    and head are the model's; the head makes a product more.
    """
    if not model.mtp_depth:
        return {}
    d = model.d_model
    attention, inner_norms = attention_counts(model, 1, last=True)
    feed_forward = _moe(model) if n_mtp_moe_layers(model) else {"dense_ffn": _ffn(d, model.d_ff, model.activation)}
    norms = 3 + (4 if model.sandwich_norm else 2)
    one = {"projection": matrix(2 * d * d), "attention": attention, **feed_forward, "norms": _norm(model) * norms + inner_norms}
    return {name: part * model.mtp_depth for name, part in one.items()}


def _norm(model: Model) -> Count:
    return vector(model.d_model * (2 if model.norm_bias else 1))


def _ffn(d: int, width: int, activation: str) -> Count:
    return matrix((3 if activation in GATED else 2) * d * width)


def _moe(model: Model) -> dict[str, Count]:
    """One MoE layer's router, experts and shared experts."""
    moe, d = model.moe, model.d_model
    if moe is None:
        return {"routers": Count(), "experts": Count(), "shared_experts": Count()}
    activation = moe.activation or model.activation
    expert = _ffn(d, moe.d_expert, activation)
    if moe.bias == "expert":
        expert += vector((2 if activation in GATED else 1) * moe.d_expert + d)
    experts = expert.choose(moe.top_k, moe.n_experts) + vector(d if moe.bias == "layer" else 0)
    shared = _ffn(d, moe.shared_width, activation) * moe.n_shared
    if moe.combine == "sigmoid_gate":
        shared += matrix(d)
    if moe.combine == "residual":
        shared += matrix(2 * d) + vector(2)
    return {"routers": _router(moe, d), "experts": experts, "shared_experts": shared}


def _router(moe: Moe, d: int) -> Count:
    """A linear scorer is one matrix; cosine and mlp pass through scorer_dim, cosine with a temperature; noise has a matrix of its own."""
    router, n = moe.router, moe.n_experts
    if not router.traits.learned:
        return Count()
    scorer = matrix(d * n) if router.scorer == "linear" else matrix((d + n) * router.scorer_dim)
    noise = matrix(d * n) if router.kind == "noisy_topk" else Count()
    return scorer + noise + vector(1 if router.scorer == "cosine" else 0) + vector(n if router.bias else 0)
