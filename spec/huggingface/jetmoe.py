"""JetMoE: attention and feed-forward experts. The norms inside the layers always have an eps of 1e-6."""

from __future__ import annotations

from typing import Any

from spec.attention import AttentionExperts
from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.rope import read_rope, write_rope
from spec.huggingface.trunk import ACTIVATIONS, aux_coefficient, balance, grouped
from spec.model import Model

Plain = dict[str, Any]


def _read(config: Reader) -> Plain:
    act = config.text("activation_function", "silu")
    if ACTIVATIONS.get(act) != "swiglu":
        config.refuse("activation_function", f"{act!r} is not silu")
    config.must_be_off("attention_dropout", "the spec has no dropout inside attention")
    kv_heads = config.integer("num_key_value_heads", 16)
    n_experts, top_k = config.integer("num_local_experts", 8), config.integer("num_experts_per_tok", 2)
    heads = kv_heads * top_k
    config.must_be("num_attention_heads", heads, heads, "it is num_key_value_heads times num_experts_per_tok")
    head_dim = config.integer("kv_channels", config.integer("head_dim", 128))
    config.must_be("head_dim", head_dim, head_dim, "it is kv_channels")
    config.value("glu")
    return {
        "n_layers": config.layers(),
        "d_model": config.integer("hidden_size"),
        "vocab_size": config.integer("vocab_size"),
        "tie_embeddings": config.flag("tie_word_embeddings", True),
        "norm_eps": 1e-6,
        "final_norm_eps": config.number("rms_norm_eps", 1e-6),
        "init_std": config.number("initializer_range", 0.01),
        **read_rope(config, 10_000.0),
        "attention": {
            "kind": "gqa",
            "n_heads": kv_heads,
            "n_kv_heads": kv_heads,
            "head_dim": head_dim,
            "output_bias": True,
            "experts": {"n_experts": n_experts, "top_k": top_k},
        },
        "moe": {
            "n_experts": n_experts,
            "top_k": top_k,
            "d_expert": config.integer("intermediate_size"),
            "bias": "layer",
            "router": {"kind": "topk_softmax"},
            "balance": balance(config.number("aux_loss_coef", 0.01)),
        },
    }


def _write(model: Model, max_len: int) -> Plain:
    attention, moe = grouped(model), model.moe
    experts = attention.experts or AttentionExperts()
    return {
        "num_hidden_layers": model.n_layers,
        "hidden_size": model.d_model,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "activation_function": "silu",
        "rms_norm_eps": model.final_norm_eps or model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": max_len,
        "rope_parameters": write_rope(model),
        "num_key_value_heads": attention.n_kv_heads,
        "kv_channels": model.head_dim,
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.top_k,
        "intermediate_size": moe.d_expert if moe else model.d_ff,
        "aux_loss_coef": aux_coefficient(model),
    }


JETMOE = Family("jetmoe", "JetMoeForCausalLM", _read, _write)
