"""Llama 4, text alone. A config.json with a vision tower is read for its `text_config`; the tower is left out."""

from __future__ import annotations

from typing import Any

from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import aux_coefficient, balance, grouped, read_heads, read_sparse_layers, read_trunk, write_heads, write_trunk
from spec.model import Model

Plain = dict[str, Any]


def _read(config: Reader) -> Plain:
    trunk = read_trunk(config, eps=1e-5, theta=500_000.0)
    config.must_be_off("router_jitter_noise", "transformers never applies it, and the spec has no such thing")
    bias = config.flag("attention_bias", False)
    config.value("for_llm_compressor")  # how a quantiser wants the module built
    heads = {"head_dim": 128, **read_heads(config, kv_heads=8)}
    step, n_layers = config.integer("interleave_moe_layer_step", 1), trunk["n_layers"]
    sparse = config.whole_list("moe_layers", range(max(step, 1) - 1, n_layers, max(step, 1)))
    width = config.integer("intermediate_size")
    return {
        **trunk,
        "attention": {
            **heads,
            **_positions(config, n_layers),
            "bias": bias,
            "output_bias": bias,
            "qk_norm": "l2" if config.flag("use_qk_norm", True) else "none",
        },
        "d_ff": config.integer("intermediate_size_mlp", 16384),
        "moe": {
            **read_sparse_layers(config, "moe_layers", sparse, n_layers),
            "n_experts": config.integer("num_local_experts", 16),
            "top_k": config.integer("num_experts_per_tok", 1),
            "d_expert": width,
            "n_shared": 1,
            "router": {"kind": "sigmoid_input"},
            "balance": balance(config.number("router_aux_loss_coef", 0.001)),
        },
    }


def _positions(config: Reader, n_layers: int) -> Plain:
    """Which layers have rotary positions, their chunks, and the temperature of the others."""
    interval = config.integer("no_rope_layer_interval", 4)
    turns = config.whole_list("no_rope_layers", [int(not interval or (index + 1) % interval != 0) for index in range(n_layers)])
    bare = [index for index, turn in enumerate(turns[:n_layers]) if not turn]
    every = bare[0] + 1 if bare else 0
    if bare and bare != list(range(every - 1, n_layers, every)):
        config.refuse("no_rope_layers", f"layers {bare} have no rotary positions, which is not every n-th")
    chunk = config.nullable("attention_chunk_size", 8192)
    chunked = ["chunked_attention" if turn else "full_attention" for turn in turns[:n_layers]]
    types = config.text_list("layer_types", chunked)
    if types != chunked and not (chunk is None and set(types) == {"full_attention"}):
        config.refuse("layer_types", "chunks go with rotary positions")
    config.must_be("attn_scale", 0.1, 0.1, "the spec's temperature has this strength")
    floor = config.number("floor_scale", 8192)
    tuned = config.flag("attn_temperature_tuning", True)
    return {"nope_every": every, "chunk": chunk, "temperature_floor": round(floor) if tuned and bare else 0}


def _write(model: Model, max_len: int) -> Plain:
    attention, moe = grouped(model), model.moe
    nope = attention.nope_every
    turns = [int(not nope or layer % nope != 0) for layer in range(1, model.n_layers + 1)]
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        "intermediate_size": moe.d_expert if moe else model.d_ff,
        "intermediate_size_mlp": model.d_ff,
        "num_local_experts": moe.n_experts if moe else 0,
        "num_experts_per_tok": moe.top_k if moe else 0,
        "moe_layers": list(model.moe_layers()),
        "use_qk_norm": attention.qk_norm == "l2",
        "router_aux_loss_coef": aux_coefficient(model),
        "router_jitter_noise": 0.0,
        "no_rope_layers": turns,
        "attention_chunk_size": attention.chunk,
        "layer_types": ["chunked_attention" if turn and attention.chunk else "full_attention" for turn in turns],
        "attn_temperature_tuning": bool(nope and attention.temperature_floor),
        "floor_scale": attention.temperature_floor or 8192,
        "attn_scale": 0.1,
        "attention_bias": attention.bias and attention.output_bias,
    }


LLAMA4 = Family("llama4_text", "Llama4ForCausalLM", _read, _write)
