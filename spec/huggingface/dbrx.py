"""DBRX: its attention and feed-forward fields have parts of their own; its LayerNorms have torch's eps and no bias.

The base of the rotary positions stands in `attn_config`, where it was published, and in `rope_parameters`, where transformers 5 looks.
"""

from __future__ import annotations

from typing import Any

from spec.huggingface.evaluated import renormalised
from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.rope import read_rope, write_rope
from spec.huggingface.trunk import ACTIVATIONS, aux_coefficient, balance, grouped
from spec.model import Model

Plain = dict[str, Any]
EPS = 1e-5


def _read_attention(config: Reader, part: Reader) -> Plain:
    part.must_be_off("attn_pdrop", "the spec has no dropout inside attention")
    found = {
        "kind": "gqa",
        "n_heads": config.integer("n_heads"),
        "n_kv_heads": part.integer("kv_n_heads", 1),
        "clip_qkv": part.value("clip_qkv"),
    }
    part.unread()
    return found


def _read_experts(part: Reader, d_model: int) -> Plain:
    act = part.value("ffn_act_fn", {"name": "silu"})
    if not isinstance(act, dict) or set(act) != {"name"} or ACTIVATIONS.get(str(act["name"])) != "swiglu":
        part.refuse("ffn_act_fn", f"{act!r} is not {{'name': 'silu'}}")
    part.must_be_off("moe_jitter_eps", "it shakes the experts' input as well as the router's")
    part.must_be("hidden_size", d_model, d_model, "it is d_model")
    norm = part.nullable("moe_normalize_expert_weights", 1.0)
    if norm not in (None, 1, 1.0):
        part.refuse("moe_normalize_expert_weights", f"{norm!r} is not 1 or null: gates are divided by their sum, or not at all")
    found = {
        "n_experts": part.integer("moe_num_experts", 4),
        "top_k": part.integer("moe_top_k", 1),
        "d_expert": part.integer("ffn_hidden_size", 3584),
        "router": {"kind": "softmax_topk", "renormalise": norm is not None},
        "balance": balance(part.number("moe_loss_weight", 0.01)),
    }
    part.unread()
    return found


def _read(config: Reader) -> Plain:
    attention, ffn = config.part("attn_config"), config.part("ffn_config")
    config.must_be_off("tie_word_embeddings", "the family has two embeddings")
    config.must_be_off("emb_pdrop", "the spec has no dropout of embeddings")
    theta = attention.number("rope_theta", config.number("rope_theta", 10_000.0))
    d_model = config.integer("d_model")
    config.value("num_key_value_heads")  # transformers repeats attn_config.kv_n_heads here
    config.must_be("hidden_size", d_model, d_model, "it is d_model")
    heads = _read_attention(config, attention)
    return {
        "n_layers": config.layers("n_layers"),
        "d_model": d_model,
        "vocab_size": config.integer("vocab_size"),
        "tie_embeddings": False,
        "norm": "layernorm",
        "norm_eps": EPS,
        "init_std": config.number("initializer_range", 0.02),
        "dropout": config.number("resid_pdrop", 0.0),
        **read_rope(config, theta),
        "attention": heads,
        "moe": _read_experts(ffn, d_model),
    }


def _write(model: Model, max_len: int) -> Plain:
    attention, moe = grouped(model), model.moe
    return {
        "d_model": model.d_model,
        "n_heads": attention.n_heads,
        "n_layers": model.n_layers,
        "max_seq_len": max_len,
        "vocab_size": model.vocab_size,
        "resid_pdrop": model.dropout,
        "emb_pdrop": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "rope_parameters": write_rope(model),
        "attn_config": {"clip_qkv": attention.clip_qkv, "kv_n_heads": attention.n_kv_heads, "attn_pdrop": 0.0, "rope_theta": model.rope_theta},
        "ffn_config": {
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": moe.d_expert if moe else model.d_ff,
            "moe_num_experts": moe.n_experts if moe else 0,
            "moe_top_k": moe.top_k if moe else 0,
            "moe_jitter_eps": None,
            "moe_loss_weight": aux_coefficient(model),
            "moe_normalize_expert_weights": 1.0 if moe and renormalised(moe.router) else None,
        },
    }


DBRX = Family("dbrx", "DbrxForCausalLM", _read, _write)
