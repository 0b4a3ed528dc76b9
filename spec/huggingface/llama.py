"""Dense Llama and Mistral."""

from __future__ import annotations

from typing import Any

from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import ALWAYS_WINDOWED, grouped, read_heads, read_trunk, write_heads, write_trunk
from spec.model import Model

Plain = dict[str, Any]


def _read_llama(config: Reader) -> Plain:
    config.must_be_off("mlp_bias", "the spec has no bias in feed-forward layers")
    bias = config.flag("attention_bias", False)
    return {
        **read_trunk(config, eps=1e-6),
        "attention": {**read_heads(config), "bias": bias, "output_bias": bias},
        "d_ff": config.integer("intermediate_size"),
        "moe": None,
    }


def _write_llama(model: Model, max_len: int) -> Plain:
    attention = grouped(model)
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        "intermediate_size": model.d_ff,
        "attention_bias": attention.bias and attention.output_bias,
        "mlp_bias": False,
    }


def _read_mistral(config: Reader) -> Plain:
    window = config.nullable("sliding_window", 4096)
    return {
        **read_trunk(config, eps=1e-6),
        "attention": {**read_heads(config, kv_heads=8), **always_windowed(window)},
        "d_ff": config.integer("intermediate_size"),
        "moe": None,
    }


def _write_mistral(model: Model, max_len: int) -> Plain:
    return {
        **write_trunk(model, max_len),
        **write_heads(model),
        "intermediate_size": model.d_ff,
        "sliding_window": grouped(model).sliding_window,
    }


def always_windowed(window: Any) -> Plain:
    """The spec's fields for a window in every layer; nothing for null."""
    return {} if window is None else {"sliding_window": window, "full_every": ALWAYS_WINDOWED}


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral)
