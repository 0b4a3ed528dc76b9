"""gpt-oss: biases everywhere, sinks, windows in every other layer, clamped SwiGLU."""

from __future__ import annotations

from typing import Any

from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import aux_coefficient, balance, full_every, grouped, read_heads, read_trunk, write_heads, write_trunk
from spec.model import Model

Plain = dict[str, Any]
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(config: Reader) -> Plain:
    trunk = read_trunk(config, eps=1e-5, theta=150_000.0, rope=_YARN)
    config.must_be("swiglu_alpha", 1.702, 1.702, "the clamped SwiGLU of the spec has this gain")
    config.must_be("swiglu_limit", 7.0, 7.0, "the clamped SwiGLU of the spec has this limit")
    config.value("quantization_config")  # how the experts lie on the disk: `family_of` has refused what cannot be unpacked
    top_k = config.integer("num_experts_per_tok", 4)
    config.must_be("experts_per_token", top_k, top_k, "it is num_experts_per_tok")
    bias = config.flag("attention_bias", True)
    window = config.integer("sliding_window", 128)
    n_layers = trunk["n_layers"]
    types = config.text_list("layer_types", ["full_attention" if index % 2 else "sliding_attention" for index in range(n_layers)])
    every = full_every(config, "layer_types", types, "sliding_attention", n_layers)
    return {
        **trunk,
        "activation": "swiglu_clamped",
        "attention": {
            "head_dim": 64,
            **read_heads(config, kv_heads=8),
            "bias": bias,
            "output_bias": bias,
            "sinks": True,
            **({} if every is None else {"sliding_window": window, "full_every": every}),
        },
        "moe": {
            "n_experts": config.integer("num_local_experts", 128),
            "top_k": top_k,
            "d_expert": config.integer("intermediate_size"),
            "bias": "expert",
            "router": {"kind": "topk_softmax", "bias": True},
            "balance": balance(config.number("router_aux_loss_coef", 0.001)),
        },
    }


def _write(model: Model, max_len: int) -> Plain:
    attention, moe = grouped(model), model.moe
    window = attention.sliding_window
    layers = range(1, model.n_layers + 1)
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        "hidden_act": "silu",
        "intermediate_size": moe.d_expert if moe else model.d_ff,
        "num_local_experts": moe.n_experts if moe else 0,
        "num_experts_per_tok": moe.top_k if moe else 0,
        "router_aux_loss_coef": aux_coefficient(model),
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "attention_bias": attention.bias and attention.output_bias,
        "sliding_window": window or 128,
        "layer_types": ["full_attention" if window is None or layer % attention.full_every == 0 else "sliding_attention" for layer in layers],
    }


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _read, _write)
