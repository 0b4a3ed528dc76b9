"""Mixtral, and Phi-3.5-MoE, which has its router and norms changed."""

from __future__ import annotations

from typing import Any

from spec.huggingface.family import Family
from spec.huggingface.llama import always_windowed
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import aux_coefficient, balance, grouped, read_heads, read_trunk, write_heads, write_trunk
from spec.model import Model

Plain = dict[str, Any]


def _read_experts(config: Reader, n_experts: int, aux: float) -> Plain:
    return {
        "n_experts": config.integer("num_local_experts", n_experts),
        "top_k": config.integer("num_experts_per_tok", 2),
        "d_expert": config.integer("intermediate_size"),
        "balance": balance(config.number("router_aux_loss_coef", aux)),
    }


def _write_experts(model: Model) -> Plain:
    moe = model.moe
    if moe is None:
        return {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": model.d_ff}
    return {
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.d_expert,
        "router_aux_loss_coef": aux_coefficient(model),
    }


def _read_mixtral(config: Reader) -> Plain:
    config.must_be_off("router_jitter_noise", "it shakes the experts' input as well as the router's")
    return {
        **read_trunk(config, eps=1e-5, theta=1_000_000.0),
        "attention": {**read_heads(config, kv_heads=8), **always_windowed(config.value("sliding_window"))},
        "moe": {**_read_experts(config, 8, 0.001), "router": {"kind": "topk_softmax"}},
    }


def _write_mixtral(model: Model, max_len: int) -> Plain:
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        **_write_experts(model),
        "sliding_window": grouped(model).sliding_window,
        "router_jitter_noise": 0.0,
    }


def _read_phimoe(config: Reader) -> Plain:
    config.leave("input_jitter_noise", "in training it shakes the experts' input as well as the router's, for which the spec has no field")
    config.must_be_off("hidden_dropout", "it drops the embeddings as well")
    bias = config.flag("attention_bias", False)
    heads = read_heads(config, kv_heads=8)
    jitter = config.number("router_jitter_noise", 0.01)
    return {
        **read_trunk(config, eps=1e-5, theta=1_000_000.0),
        "norm": "layernorm",
        "norm_bias": True,
        "lm_head_bias": config.flag("lm_head_bias", False),
        "attention": {**heads, "bias": bias, "output_bias": bias, **always_windowed(config.value("sliding_window"))},
        "moe": {**_read_experts(config, 16, 0.001), "router": {"kind": "sparsemixer", "jitter": jitter}},
    }


def _write_phimoe(model: Model, max_len: int) -> Plain:
    attention = grouped(model)
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        **_write_experts(model),
        "attention_bias": attention.bias and attention.output_bias,
        "lm_head_bias": model.lm_head_bias,
        "sliding_window": attention.sliding_window,
        "router_jitter_noise": model.moe.router.jitter if model.moe else 0.0,
        "input_jitter_noise": 0.0,
    }


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral)
PHIMOE = Family("phimoe", "PhimoeForCausalLM", _read_phimoe, _write_phimoe)
