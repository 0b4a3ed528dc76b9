"""DeepSeek-V2 and V3: latent attention, shared experts, groups. The norms of the latents have an eps of their own, 1e-6."""

from __future__ import annotations

from typing import Any

from spec.attention import LatentAttention
from spec.huggingface.family import Family
from spec.huggingface.reader import Reader
from spec.huggingface.trunk import aux_coefficient, balance, read_sparse_layers, read_trunk, write_trunk
from spec.model import Model

Plain = dict[str, Any]


def _read_attention(config: Reader) -> Plain:
    config.must_be_off("attention_bias", "latent attention of the spec has no biases")
    config.must_be_off("mlp_bias", "the spec has no bias in feed-forward layers")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if kv_heads != heads:
        config.refuse("num_key_value_heads", f"{kv_heads} is not the {heads} of num_attention_heads: latent attention has one for each")
    nope, rope, v = (config.integer(key, default) for key, default in (("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64), ("v_head_dim", 128)))
    for key, derived in (("head_dim", rope), ("qk_head_dim", nope + rope)):
        config.must_be(key, derived, derived, "it follows from the other widths")
    return {
        "kind": "mla",
        "n_heads": heads,
        "q_lora_rank": config.nullable("q_lora_rank", 1536) or 0,
        "kv_lora_rank": config.integer("kv_lora_rank", 512),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": v,
        "norm_eps": 1e-6,
    }


def _write_attention(model: Model) -> Plain:
    attention = model.attention if isinstance(model.attention, LatentAttention) else LatentAttention()
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads,
        "q_lora_rank": attention.q_lora_rank or None,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": False,
    }


def _read_experts(config: Reader, n_layers: int, n_shared: int, first_dense: int) -> Plain:
    config.must_be("moe_layer_freq", 1, 1, "every layer after the dense ones is MoE")
    shared = config.integer("n_shared_experts", n_shared)
    if not shared:
        config.refuse("n_shared_experts", "0 is not supported: the family always builds shared experts")
    first = config.integer("first_k_dense_replace", first_dense)
    return {
        **read_sparse_layers(config, "first_k_dense_replace", range(first, n_layers), n_layers),
        "n_experts": config.integer("n_routed_experts"),
        "top_k": config.integer("num_experts_per_tok"),
        "d_expert": config.integer("moe_intermediate_size"),
        "n_shared": shared,
    }


def _write_experts(model: Model) -> Plain:
    moe = model.moe
    if moe is None:
        return {"first_k_dense_replace": model.n_layers, "intermediate_size": model.d_ff, "n_routed_experts": 1, "num_experts_per_tok": 1}
    router = moe.router
    limited = router.top_groups < router.n_groups
    return {
        "intermediate_size": model.d_ff,
        "moe_intermediate_size": moe.d_expert,
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "n_shared_experts": moe.n_shared * moe.shared_width // moe.d_expert,
        "first_k_dense_replace": model.moe_layers()[0],
        "routed_scaling_factor": router.scale,
        "n_group": router.n_groups if limited else 1,
        "topk_group": router.top_groups if limited else 1,
    }


def _groups(config: Reader, score: str, n_groups: int = 1, top_groups: int = 1) -> Plain:
    return {"n_groups": config.integer("n_group", n_groups), "top_groups": config.integer("topk_group", top_groups), "group_score": score}


def _read_v2(config: Reader) -> Plain:
    trunk = read_trunk(config, eps=1e-6, deepseek=True)
    config.must_be("scoring_func", "softmax", "softmax", "the family's scores are a softmax")
    config.must_be("norm_topk_prob", False, False, "transformers does not renormalise the family's gates")
    method = config.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        config.refuse("topk_method", f"{method!r} is not among greedy, group_limited_greedy")
    groups = _groups(config, "max")
    return {
        **trunk,
        "attention": _read_attention(config),
        "d_ff": config.integer("intermediate_size"),
        "moe": {
            **_read_experts(config, trunk["n_layers"], 2, 0),
            "router": {
                "kind": "softmax_topk",
                "scale": config.number("routed_scaling_factor", 1.0),
                **(groups if method == "group_limited_greedy" else {}),
            },
            "balance": balance(config.number("router_aux_loss_coef", 0.001)),
        },
    }


def _write_v2(model: Model, max_len: int) -> Plain:
    written = {**write_trunk(model, max_len), **_write_attention(model), **_write_experts(model)}
    limited = written.get("n_group", 1) > 1
    return {
        **written,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "norm_topk_prob": False,
        "router_aux_loss_coef": aux_coefficient(model),
        "mlp_bias": False,
    }


def _read_v3(config: Reader) -> Plain:
    trunk = read_trunk(config, eps=1e-6, deepseek=True)
    config.must_be("scoring_func", "sigmoid", "sigmoid", "the family's scores are sigmoids")
    config.must_be("topk_method", "noaux_tc", "noaux_tc", "the family selects by score plus bias")
    config.must_be("norm_topk_prob", True, True, "the spec's sigmoid router always divides the gates by their sum")
    config.flag("rope_interleave", True)  # only the order of rows on the disk
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        config.leave(key, "their extra block reads the stream after the last norm, ours before it, so that its weights do not carry over")
    aux = config.number("router_aux_loss_coef", 0.0)
    return {
        **trunk,
        "attention": _read_attention(config),
        "d_ff": config.integer("intermediate_size"),
        "moe": {
            **_read_experts(config, trunk["n_layers"], 1, 3),
            "router": {
                "kind": "sigmoid_topk",
                "scale": config.number("routed_scaling_factor", 2.5),
                **_groups(config, "top2_sum", 8, 4),
            },
            "balance": balance(aux, {"kind": "loss_free_bias"}),
        },
    }


def _write_v3(model: Model, max_len: int) -> Plain:
    return {
        **write_trunk(model, max_len),
        **_write_attention(model),
        **_write_experts(model),
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _read_v2, _write_v2)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read_v3, _write_v3)
