"""What Llama and its kin say alike in a config.json: sizes, norms, embeddings, heads, and which layers are windowed or MoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spec.attention import GroupedQueryAttention
from spec.huggingface.reader import Reader
from spec.huggingface.rope import read_rope, write_rope
from spec.model import Model
from spec.moe import Activation

Plain = dict[str, Any]
ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
ALWAYS_WINDOWED = 10_000
"""`full_every` beyond any model's depth: no layer attends to all tokens."""


def read_trunk(config: Reader, *, eps: float, theta: float = 10_000.0, deepseek: bool = False, rope: Plain | None = None) -> Plain:
    """Sizes, norm, embeddings and rotary positions."""
    act = config.text("hidden_act", "silu")
    if act not in ACTIVATIONS:
        config.refuse("hidden_act", f"{act!r} is not among {', '.join(ACTIVATIONS)}, whose gated form the spec has")
    config.must_be_off("attention_dropout", "the spec has no dropout inside attention")
    return {
        "n_layers": config.layers(),
        "d_model": config.integer("hidden_size"),
        "vocab_size": config.integer("vocab_size"),
        "tie_embeddings": config.flag("tie_word_embeddings", False),
        "activation": ACTIVATIONS.get(act, "swiglu"),
        "norm": "rmsnorm",
        "norm_eps": config.number("rms_norm_eps", eps),
        "init_std": config.number("initializer_range", 0.02),
        **read_rope(config, theta, deepseek=deepseek, default=rope),
    }


def write_trunk(model: Model, max_len: int) -> Plain:
    """The same, the other way."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    moe_activation = model.moe.activation if model.moe else None
    return {
        "num_hidden_layers": model.n_layers,
        "hidden_size": model.d_model,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": names.get(moe_activation or model.activation, "silu"),
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": max_len,
        "rope_parameters": write_rope(model),
        "attention_dropout": 0.0,
    }


def read_heads(config: Reader, *, kv_heads: int | None = None) -> Plain:
    """Grouped-query attention. `kv_heads` is the family's default; None means one for each query head."""
    heads = config.integer("num_attention_heads")
    found: Plain = {"kind": "gqa", "n_heads": heads, "n_kv_heads": config.integer("num_key_value_heads", kv_heads or heads)}
    if "head_dim" in config:
        found["head_dim"] = config.integer("head_dim")
    return found


def write_heads(model: Model) -> Plain:
    """The same, the other way. Nothing for latent attention, which has fields of its own."""
    attention = model.attention
    if not isinstance(attention, GroupedQueryAttention):
        return {"num_attention_heads": attention.n_heads, "num_key_value_heads": attention.n_heads}
    return {"num_attention_heads": attention.n_heads, "num_key_value_heads": attention.n_kv_heads, "head_dim": model.head_dim}


def grouped(model: Model) -> GroupedQueryAttention:
    """The model's attention; for latent attention one that nobody has, so that reading it back shows the difference."""
    return model.attention if isinstance(model.attention, GroupedQueryAttention) else GroupedQueryAttention()


def full_every(config: Reader, key: str, types: Sequence[str], windowed: str, n_layers: int) -> int | None:
    """`full_every` of a pattern of layer types; None where no layer is windowed. Refuses patterns that the spec cannot say."""
    unknown = set(types) - {windowed, "full_attention"}
    if unknown or len(types) != n_layers:
        told = f"{', '.join(sorted(unknown))}: not among {windowed}, full_attention" if unknown else f"{len(types)} types for {n_layers} layers"
        config.refuse(key, told)
        return None
    full = [index for index, name in enumerate(types) if name == "full_attention"]
    if len(full) == len(types):
        return None
    every = full[0] + 1 if full else ALWAYS_WINDOWED
    if full != list(range(every - 1, len(types), every)):
        config.refuse(key, f"layers {_few(full)} attend to all tokens, which is not every n-th")
    return every


def read_sparse_layers(config: Reader, key: str, sparse: Sequence[int], n_layers: int) -> Plain:
    """`first_k_dense` and `every` for the MoE layers `sparse`. Refuses what is not every n-th layer from some layer on."""
    if sparse:
        # A single MoE layer is the last that any step reaches: the longest step that leaves dense layers before it.
        every = sparse[1] - sparse[0] if len(sparse) > 1 else max(sparse[0] + 1, 1)
        first = sparse[0] - every + 1
        if every > 0 and first >= 0 and list(sparse) == list(range(sparse[0], n_layers, every)):
            return {"first_k_dense": first, "every": every}
    config.refuse(key, f"MoE layers {_few(sparse)} of {n_layers} are not every n-th layer after some dense ones")
    return {}


def _few(numbers: Sequence[int]) -> str:
    return f"{list(numbers[:8])}" if len(numbers) <= 8 else f"{list(numbers[:8])} and {len(numbers) - 8} more"


def balance(coefficient: float, *more: Plain) -> list[Plain]:
    """The family's auxiliary loss under the same coefficient, and other terms. The two normalise over layers and choices differently."""
    return [*([{"kind": "switch_aux", "coefficient": coefficient}] if coefficient else []), *more]


def aux_coefficient(model: Model) -> float:
    """The coefficient of the model's Switch loss, 0 where it has none."""
    terms = model.moe.balance if model.moe else []
    return next((term.coefficient for term in terms if term.kind == "switch_aux"), 0.0)
