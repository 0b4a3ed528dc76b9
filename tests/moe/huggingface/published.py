"""Small, randomly initialised models of transformers, one for each family: the oracle of imports and exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
PLAIN: dict[str, Any] = {**SIZES, "tie_word_embeddings": False, "rope_parameters": ROPE, "rms_norm_eps": 1e-6, "pad_token_id": None}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 48}
DEEPSEEK: dict[str, Any] = {
    **PLAIN,
    **EXPERTS,
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "q_lora_rank": 16},
    **{"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 1.0}


def _build(name: str, configuration: str = "", /, **config: Any) -> nn.Module:
    kind = getattr(transformers, f"{configuration or name}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}Config")
    causal: nn.Module = getattr(transformers, f"{name}ForCausalLM")(kind(**config))
    return causal


def _deepseek(version: str, **changes: Any) -> nn.Module:
    return _build(f"Deepseek{version}", **DEEPSEEK | changes)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 5000.0, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4},
    **{"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 48, "factor": 1.5},
}
LLAMA4 = {"num_hidden_layers": 4, "bos_token_id": None, "eos_token_id": None, "rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}
SHARED = {"num_experts": 6, "shared_expert_intermediate_size": 40, "num_key_value_heads": 2}
V3 = {"n_group": 3, "topk_group": 2, "norm_topk_prob": True}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _build("Llama", intermediate_size=48, num_key_value_heads=2, **PLAIN),
    "llama, tied, linear, biases": lambda: _build(
        "Llama", intermediate_size=48, attention_bias=True, hidden_act="gelu",
        **PLAIN | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ),
    "llama 3.1": lambda: _build(
        "Llama", intermediate_size=48, head_dim=16,
        **PLAIN | {"rope_parameters": {**LLAMA3, "high_freq_factor": 4.0}},
    ),
    "mistral": lambda: _build("Mistral", intermediate_size=48, num_key_value_heads=2, head_dim=16, sliding_window=8, **PLAIN),
    "qwen2": lambda: _build("Qwen2", intermediate_size=48, num_key_value_heads=2, **PLAIN),
    "qwen3": lambda: _build("Qwen3", intermediate_size=48, num_key_value_heads=2, head_dim=16, **PLAIN),
    "mixtral": lambda: _build("Mixtral", intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, **PLAIN),
    "olmoe": lambda: _build("Olmoe", intermediate_size=24, num_experts=6, num_experts_per_tok=2, num_key_value_heads=2, **PLAIN),
    "qwen2_moe": lambda: _build("Qwen2Moe", mlp_only_layers=[0], **SHARED, **PLAIN, **EXPERTS),
    "qwen2_moe, windows": lambda: _build(
        "Qwen2Moe", **SHARED, use_sliding_window=True, sliding_window=8,
        decoder_sparse_step=2, **PLAIN, **EXPERTS,
    ),
    "qwen3_moe": lambda: _build("Qwen3Moe", num_experts=6, num_key_value_heads=2, head_dim=16, norm_topk_prob=True, **PLAIN, **EXPERTS),
    "deepseek_v2": lambda: _deepseek("V2", topk_method="group_limited_greedy", n_group=3, topk_group=2),
    "deepseek_v2, greedy, no query rank, yarn": lambda: _deepseek(
        "V2", q_lora_rank=None, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}, rms_norm_eps=1e-5
    ),
    "deepseek_v3": lambda: _deepseek("V3", **V3),
    "deepseek_v3, halves, yarn": lambda: _deepseek("V3", **V3, rope_interleave=False, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "dbrx": lambda: _build(
        "Dbrx", d_model=32, n_heads=4, n_layers=3, max_seq_len=64, vocab_size=264, pad_token_id=None, rope_parameters=ROPE,
        attn_config={"clip_qkv": 0.6, "kv_n_heads": 2, "rope_theta": 5000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    ),
    "llama4": lambda: _build(
        "Llama4", "Llama4Text", **PLAIN | LLAMA4, intermediate_size=24, intermediate_size_mlp=48, num_local_experts=6,
        num_experts_per_tok=2, num_key_value_heads=2, head_dim=8, interleave_moe_layer_step=2, no_rope_layer_interval=2, attention_chunk_size=8,
        floor_scale=4,
    ),
    "gpt_oss": lambda: _build(
        "GptOss", intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, head_dim=16, sliding_window=8,
        **PLAIN | {"rope_parameters": {**YARN, "truncate": False}},
    ),
    "phimoe": lambda: _build(
        "Phimoe", intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, attention_bias=True, lm_head_bias=True,
        sliding_window=8,
        **PLAIN | {"rope_parameters": LONG},
    ),
    "jetmoe": lambda: _build(
        "JetMoe", intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, kv_channels=8,
        **{key: value for key, value in PLAIN.items() if key != "num_attention_heads"} | {"rms_norm_eps": 1e-5},
    ),
}  # fmt: skip


def published(name: str) -> nn.Module:
    """The family's model in evaluation mode, with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.dim() == 1 and "norm" in key and key.endswith("weight"):
                tensor.normal_(1.0, 0.15)
            else:
                tensor.normal_(0.0, 0.15)
        for key, tensor in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1)
    return model
