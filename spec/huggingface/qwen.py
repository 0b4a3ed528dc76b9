"""Qwen2 and Qwen3, dense, and their MoE kin (Qwen1.5-MoE is a Qwen2-MoE)."""

from __future__ import annotations

from typing import Any

from spec.huggingface.evaluated import renormalised
from spec.huggingface.family import Family
from spec.huggingface.llama import always_windowed
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import (
    aux_coefficient,
    balance,
    full_every,
    grouped,
    read_heads,
    read_sparse_layers,
    read_trunk,
    write_heads,
    write_trunk,
)
from spec.model import Model

Plain = dict[str, Any]


# ----- dense


def _read_dense(config: Reader, n_layers: int) -> Plain:
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    config.value("sliding_window")
    first = config.integer("max_window_layers", 28)
    usual = ["sliding_attention" if window and index >= first else "full_attention" for index in range(n_layers)]
    types = config.text_list("layer_types", usual)
    if window is None:
        return {}
    every = full_every(config, "max_window_layers", types, "sliding_attention", n_layers)
    return {} if every is None else {"sliding_window": window, "full_every": every}


def _read_qwen2(config: Reader) -> Plain:
    trunk = read_trunk(config, eps=1e-6)
    return {
        **trunk,
        "attention": {**read_heads(config), **_read_dense(config, trunk["n_layers"]), "bias": True},
        "d_ff": config.integer("intermediate_size"),
        "moe": None,
    }


def _read_qwen3(config: Reader) -> Plain:
    trunk, bias = read_trunk(config, eps=1e-6), config.flag("attention_bias", False)
    heads = {"head_dim": 128, **read_heads(config), **_read_dense(config, trunk["n_layers"])}
    return {
        **trunk,
        "attention": {**heads, "bias": bias, "output_bias": bias, "qk_norm": "head"},
        "d_ff": config.integer("intermediate_size"),
        "moe": None,
    }


def _write_dense(model: Model, max_len: int) -> Plain:
    window = grouped(model).sliding_window
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        "intermediate_size": model.d_ff,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": 0 if window else model.n_layers,
    }


def _write_qwen3(model: Model, max_len: int) -> Plain:
    attention = grouped(model)
    return {**_write_dense(model, max_len), "attention_bias": attention.bias and attention.output_bias}


# ----- MoE


def _read_experts(config: Reader, n_layers: int, n_experts: int, top_k: int) -> Plain:
    step, dense = config.integer("decoder_sparse_step", 1), set(config.whole_list("mlp_only_layers", []))
    sparse = [index for index in range(n_layers) if index not in dense and step and (index + 1) % step == 0]
    return {
        **read_sparse_layers(config, "decoder_sparse_step" if step != 1 else "mlp_only_layers", sparse, n_layers),
        "n_experts": config.integer("num_experts", config.integer("num_local_experts", n_experts)),
        "top_k": config.integer("num_experts_per_tok", top_k),
        "d_expert": config.integer("moe_intermediate_size"),
        "balance": balance(config.number("router_aux_loss_coef", 0.001)),
    }


def _write_experts(model: Model) -> Plain:
    moe = model.moe
    if moe is None:
        return {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0, "intermediate_size": model.d_ff}
    stepped = moe.first_k_dense == 0
    sparse = model.moe_layers()
    return {
        "intermediate_size": model.d_ff,
        "moe_intermediate_size": moe.d_expert,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": renormalised(moe.router),
        "decoder_sparse_step": moe.every if stepped else 1,
        "mlp_only_layers": [] if stepped else [index for index in range(model.n_layers) if index not in sparse],
        "router_aux_loss_coef": aux_coefficient(model),
    }


def _read_qwen2_moe(config: Reader) -> Plain:
    trunk = read_trunk(config, eps=1e-6)
    n_layers = trunk["n_layers"]
    window, first = config.integer("sliding_window", 4096), config.integer("max_window_layers", 28)
    usual = ["sliding_attention" if index % 2 == 0 and index < first else "full_attention" for index in range(n_layers)]
    types = config.text_list("layer_types", usual)
    windows: Plain = {}
    if config.flag("use_sliding_window", False):
        every = full_every(config, "max_window_layers", types, "sliding_attention", n_layers)
        windows = {} if every is None else {"sliding_window": window, "full_every": every}
    shared = config.integer("shared_expert_intermediate_size", 5632)
    router = {"kind": "softmax_topk", "renormalise": config.flag("norm_topk_prob", False)}
    return {
        **trunk,
        "attention": {**read_heads(config, kv_heads=16), **windows, "bias": config.flag("qkv_bias", True)},
        "d_ff": config.integer("intermediate_size", 5632),
        "moe": {
            **_read_experts(config, n_layers, 60, 4),
            "n_shared": 1,
            "d_shared": shared,
            "combine": "sigmoid_gate",
            "router": router,
        },
    }


def _write_qwen2_moe(model: Model, max_len: int) -> Plain:
    attention, moe = grouped(model), model.moe
    layers = range(1, model.n_layers + 1)
    window = attention.sliding_window
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        **_write_experts(model),
        "shared_expert_intermediate_size": moe.n_shared * moe.shared_width if moe else 0,
        "qkv_bias": attention.bias,
        "use_sliding_window": window is not None,
        "sliding_window": window or 4096,
        "layer_types": ["full_attention" if window is None or layer % attention.full_every == 0 else "sliding_attention" for layer in layers],
    }


def _read_qwen3_moe(config: Reader) -> Plain:
    trunk, bias = read_trunk(config, eps=1e-6), config.flag("attention_bias", False)
    window = config.value("sliding_window", 4096)
    windows = always_windowed(window) if config.flag("use_sliding_window", False) else {}
    config.value("max_window_layers")
    router = {"kind": "softmax_topk", "renormalise": config.flag("norm_topk_prob", False)}
    return {
        **trunk,
        "attention": {**read_heads(config, kv_heads=4), **windows, "bias": bias, "output_bias": bias, "qk_norm": "head"},
        "d_ff": config.integer("intermediate_size", 6144),
        "moe": {**_read_experts(config, trunk["n_layers"], 128, 8), "router": router},
    }


def _write_qwen3_moe(model: Model, max_len: int) -> Plain:
    attention = grouped(model)
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        **_write_experts(model),
        "attention_bias": attention.bias and attention.output_bias,
        "use_sliding_window": attention.sliding_window is not None,
        "sliding_window": attention.sliding_window,
    }


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_dense)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3)
QWEN2_MOE = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe)
QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe)
