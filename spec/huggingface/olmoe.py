"""OLMoE."""

from __future__ import annotations

from typing import Any

from spec.huggingface.evaluated import renormalised
from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import aux_coefficient, balance, grouped, read_heads, read_trunk, write_heads, write_trunk
from spec.model import Model

Plain = dict[str, Any]


def _read(config: Reader) -> Plain:
    bias = config.flag("attention_bias", False)
    config.must_be_off("clip_qkv", "the family clamps after it normalises, the spec before")
    heads = {**read_heads(config), "bias": bias, "output_bias": bias, "qk_norm": "full"}
    return {
        **read_trunk(config, eps=1e-5),
        "attention": heads,
        "moe": {
            "n_experts": config.integer("num_experts", 64),
            "top_k": config.integer("num_experts_per_tok", 8),
            "d_expert": config.integer("intermediate_size"),
            "router": {"kind": "softmax_topk", "renormalise": config.flag("norm_topk_prob", False)},
            "balance": balance(config.number("router_aux_loss_coef", 0.01)),
        },
    }


def _write(model: Model, max_len: int) -> Plain:
    attention, moe = grouped(model), model.moe
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        "attention_bias": attention.bias and attention.output_bias,
        "clip_qkv": None,
        "num_experts": moe.n_experts if moe else 0,
        "num_experts_per_tok": moe.top_k if moe else 0,
        "intermediate_size": moe.d_expert if moe else model.d_ff,
        "norm_topk_prob": moe is not None and renormalised(moe.router),
        "router_aux_loss_coef": aux_coefficient(model),
    }


OLMOE = Family("olmoe", "OlmoeForCausalLM", _read, _write)
