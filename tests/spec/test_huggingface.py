"""config.json and the spec: published configurations give the published parameter counts, and nothing is read over in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec import presets
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.huggingface import FAMILIES, ConfigError, config_of, experiment_of, model_of, read_model
from spec.huggingface.evaluated import evaluated
from spec.model import Model

Plain = dict[str, Any]

# As they lie beside the weights, in the spelling of the time; totals as in the table of published architectures.
LLAMA3_SCOUT = {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
YARN_OSS = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}
YARN_V3 = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
CONFIGS: dict[str, tuple[int, Plain]] = {
    "Mixtral-8x7B": (46_702_792_704, {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    }),
    "OLMoE-1B-7B": (6_919_161_856, {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "eos_token_id": 50279,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "vocab_size": 50304,
    }),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "Qwen3-30B-A3B": (30_532_122_624, {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    }),
    "DeepSeek-V2": (235_741_434_880, {
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "x.Y"},
        "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False,
        "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128, "pretraining_tp": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {**YARN_V3, "mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000, "routed_scaling_factor": 16.0,
        "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy",
        "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
    }),
    "DeepSeek-V3": (671_026_404_352, {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
        "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": YARN_V3, "rope_theta": 10000, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129280,
    }),
    "DBRX": (131_596_523_520, {
        "architectures": ["DbrxForCausalLM"], "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
        "d_model": 6144, "emb_pdrop": 0.0, "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48, "n_layers": 40,
        "ffn_config": {"ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0, "moe_loss_weight": 0.05, "moe_num_experts": 16,
                       "moe_top_k": 4, "moe_normalize_expert_weights": 1},
        "output_router_logits": False, "resid_pdrop": 0.0, "rope_theta": None, "router_aux_loss_coef": None, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 100352,
    }),
    "Llama 4 Scout": (107_769_861_120, {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "vision_config": {"hidden_size": 1408},
        "text_config": {
            "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": True,
            "floor_scale": 8192, "for_llm_compressor": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
            "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760,
            "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
            "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_SCOUT,
            "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "use_cache": True, "use_qk_norm": True, "vocab_size": 202048,
        },
    }),
    "gpt-oss-20b": (20_914_757_184, {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "experts_per_token": 4, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "rope_scaling": YARN_OSS,
        "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
    }),
    "Phi-3.5-MoE": (41_873_153_344, {
        "architectures": ["PhiMoEForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0,
        "hidden_size": 4096, "initializer_range": 0.02, "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
        "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "original_max_position_embeddings": 4096, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "router_jitter_noise": 0.01, "sliding_window": 131072,
        "rope_scaling": {"long_factor": [1.0 + i / 8 for i in range(64)], "long_mscale": 1.243163121016122, "original_max_position_embeddings": 4096,
                         "short_factor": [1.0] * 64, "short_mscale": 1.243163121016122, "type": "longrope"},
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32064,
    }),
    "JetMoE-8B": (8_522_237_952, {
        "activation_function": "silu", "architectures": ["JetMoEForCausalLM"], "aux_loss_coef": 0.01, "glu": True,
        "hidden_size": 2048, "initializer_range": 0.01, "intermediate_size": 5632, "kv_channels": 128, "max_position_embeddings": 4096,
        "model_type": "jetmoe", "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "num_local_experts": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 32000,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations_give_the_published_sizes(name: str) -> None:
    total, config = CONFIGS[name]
    before = copy.deepcopy(config)
    spec = experiment_of(config)
    assert config == before
    assert price(spec).total_params == total
    again = model_of(config_of(spec.model))
    assert evaluated(again) == evaluated(spec.model)
    assert again.init_std == spec.model.init_std


@pytest.mark.parametrize(
    ("name", "changes", "pointer"),
    [
        ("Mixtral-8x7B", {"hidden_act": "relu"}, "/hidden_act"),
        ("Mixtral-8x7B", {"attention_dropout": 0.1}, "/attention_dropout"),
        ("Mixtral-8x7B", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "/rope_scaling/rope_type"),
        ("Mixtral-8x7B", {"rope_scaling": {"type": "linear", "factor": 2.0, "mystery": 1}}, "/rope_scaling/mystery"),
        ("Mixtral-8x7B", {"partial_rotary_factor": 0.5}, "/partial_rotary_factor"),
        ("Mixtral-8x7B", {"mystery": 3}, "/mystery"),
        ("Mixtral-8x7B", {"hidden_size": "wide"}, "/hidden_size"),
        ("Mixtral-8x7B", {"hidden_size": None}, "/hidden_size"),
        ("Mixtral-8x7B", {"num_hidden_layers": 10**9}, "/num_hidden_layers"),
        ("Mixtral-8x7B", {"router_jitter_noise": 0.01}, "/router_jitter_noise"),
        ("Mixtral-8x7B", {"quantization_config": {"quant_method": "gptq"}}, "/quantization_config"),
        ("Mixtral-8x7B", {"model_type": "mamba"}, "/model_type"),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "/clip_qkv"),
        ("Qwen1.5-MoE-A2.7B", {"mlp_only_layers": [3, 7]}, "/mlp_only_layers"),
        ("Qwen1.5-MoE-A2.7B", {"mlp_only_layers": "none"}, "/mlp_only_layers"),
        ("Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}, "/max_window_layers"),
        ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "/topk_method"),
        ("DeepSeek-V2", {"norm_topk_prob": True}, "/norm_topk_prob"),
        ("DeepSeek-V2", {"rope_scaling": {**YARN_V3, "attention_factor": 2.0}}, "/rope_scaling/attention_factor"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "/scoring_func"),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, "/moe_layer_freq"),
        ("DeepSeek-V3", {"n_shared_experts": 0}, "/n_shared_experts"),
        ("gpt-oss-20b", {"swiglu_limit": 5.0}, "/swiglu_limit"),
        ("gpt-oss-20b", {"layer_types": ["sliding_attention"] * 23 + ["full_attention"]}, None),
        ("gpt-oss-20b", {"layer_types": ["full_attention"] + ["sliding_attention"] * 23}, "/layer_types"),
        ("gpt-oss-20b", {"layer_types": ["sliding_attention"]}, "/layer_types"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "fp8"}}, "/quantization_config"),
        ("DBRX", {"ffn_config": {"ffn_act_fn": {"name": "gelu"}}}, "/ffn_config/ffn_act_fn"),
        ("Phi-3.5-MoE", {"hidden_dropout": 0.1}, "/hidden_dropout"),
        ("JetMoE-8B", {"activation_function": "gelu"}, "/activation_function"),
    ],
)
def test_what_cannot_be_carried_over_is_named(name: str, changes: Plain, pointer: str | None) -> None:
    config = {**CONFIGS[name][1], **changes}
    if pointer is None:
        model_of(config)
        return
    with pytest.raises(ConfigError) as refused:
        model_of(config)
    assert pointer in [problem.pointer for problem in refused.value.problems]
    key = pointer.rsplit("/", 1)[1]
    assert all(problem.detail.startswith(key) for problem in refused.value.problems if problem.pointer == pointer)


def test_what_belongs_to_training_alone_is_told() -> None:
    assert [note.split()[0] for note in read_model(CONFIGS["DeepSeek-V3"][1])[1]] == ["num_nextn_predict_layers"]
    assert [note.split()[0] for note in read_model(CONFIGS["Phi-3.5-MoE"][1])[1]] == ["input_jitter_noise"]
    assert read_model(CONFIGS["Mixtral-8x7B"][1])[1] == []


def test_values_that_the_spec_cannot_hold_are_named_by_its_fields() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe.*top_k 9 > n_experts 8"):
        model_of({**CONFIGS["Mixtral-8x7B"][1], "num_experts_per_tok": 9})
    with pytest.raises(ConfigError, match="vocab_size 96 < 257"):
        experiment_of({**CONFIGS["Mixtral-8x7B"][1], "vocab_size": 96})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_a_damaged_configuration_is_refused_or_read_but_never_an_error_of_ours(name: str, data: st.DataObject) -> None:
    config = copy.deepcopy(CONFIGS[name][1])
    parts: list[Plain] = [config, *(value for value in config.values() if isinstance(value, dict))]
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(parts))
        key = data.draw(st.sampled_from(sorted(part)) if part else st.just("model_type"))
        if data.draw(st.booleans()):
            part.pop(key, None)
        else:
            part[key] = data.draw(anything)
    try:
        found = experiment_of(config)
    except ConfigError as error:
        assert error.problems and all(problem.detail for problem in error.problems)
    else:
        assert isinstance(found, ExperimentSpec)


# ----- from a spec


def tiny(**changes: Any) -> Model:
    return Model.model_validate({"n_layers": 4, "d_model": 32, "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2}, **changes})


@pytest.mark.parametrize("name", [name for name in presets.names() if presets.describe(name).size == "full"])
def test_a_published_preset_has_a_family_or_is_told_why_not(name: str) -> None:
    model = presets.load(name).model
    try:
        config = config_of(model)
    except ConfigError as error:
        assert error.problems and all(problem.pointer or problem.detail for problem in error.problems)
    else:
        assert config["model_type"] in FAMILIES
        assert evaluated(model_of(config)) == evaluated(model) or config["model_type"] == "deepseek_v3"


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"moe": None}, "llama"),
        ({"moe": None, "attention": {"kind": "gqa", "qk_norm": "head"}}, "qwen3"),
        ({"moe": {"router": {"kind": "topk_softmax"}}}, "mixtral"),
        ({"moe": {"router": {"kind": "gshard"}}}, "mixtral"),
        ({"moe": {"router": {"kind": "softmax_topk", "renormalise": True}}}, "mixtral"),
        ({"moe": {"router": {"kind": "switch", "jitter": 0.01}, "top_k": 1}, "attention": {"kind": "gqa", "qk_norm": "full"}}, "olmoe"),
        ({"moe": {"every": 2, "router": {"kind": "softmax_topk"}}, "attention": {"kind": "gqa", "qk_norm": "head"}}, "qwen3_moe"),
        (
            {"moe": {"n_shared": 1, "combine": "sigmoid_gate", "router": {"kind": "softmax_topk"}}, "attention": {"kind": "gqa", "bias": True}},
            "qwen2_moe",
        ),
        ({"moe": {"n_shared": 2, "router": {"kind": "softmax_topk"}}, "attention": {"kind": "mla", "norm_eps": 1e-6}}, "deepseek_v2"),
        ({"moe": {"n_shared": 2, "router": {"kind": "sigmoid_topk"}}, "attention": {"kind": "mla", "norm_eps": 1e-6}}, "deepseek_v3"),
        ({"moe": {"first_k_dense": 3}, "attention": {"kind": "gqa", "qk_norm": "head"}}, "qwen3_moe"),
    ],
)
def test_the_family_is_the_first_that_can_say_it_all(changes: Plain, family: str) -> None:
    config = config_of(tiny(**changes))
    assert config["model_type"] == family
    back = model_of(config)
    assert back.moe_layers() == tiny(**changes).moe_layers()


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"moe": {"router": {"kind": "topk_softmax"}, "capacity": {"kind": "factor"}}}, "/model/moe/capacity/kind"),
        ({"moe": {"router": {"kind": "expert_choice"}}}, "/model/moe/router/kind"),
        ({"moe": {"router": {"kind": "topk_softmax", "scorer": "cosine"}}}, "/model/moe/router/scorer"),
        ({"moe": {"router": {"kind": "topk_softmax"}, "balance": [{"kind": "loss_free_bias"}]}}, "/model/moe/balance"),
        ({"moe": {"n_shared": 1, "router": {"kind": "topk_softmax"}, "combine": "residual"}}, "/model/moe/combine"),
        ({"moe": None, "sandwich_norm": True}, "/model/sandwich_norm"),
        ({"moe": None, "activation": "relu"}, "/model/activation"),
        ({"moe": None, "norm": "layernorm"}, "/model/norm"),
    ],
)
def test_what_no_family_can_say_is_named(changes: Plain, pointer: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(tiny(**changes))
    assert pointer in [problem.pointer for problem in refused.value.problems]
    assert "family" in str(refused.value)


def test_a_family_can_be_asked_for() -> None:
    model = tiny(moe={"router": {"kind": "topk_softmax"}}, attention={"kind": "gqa", "qk_norm": "head"})
    assert config_of(model, family="qwen3_moe")["norm_topk_prob"] is True
    with pytest.raises(ConfigError, match="qk_norm"):
        config_of(model, family="mixtral")
    with pytest.raises(ConfigError, match="not among"):
        config_of(model, family="gpt2")


def test_every_field_is_compared_or_known_to_belong_to_training() -> None:
    """A new field of a MoE layer or a router has to be put into `evaluated`, or here."""
    training = {"random_share", "hash", "sinkhorn_iterations", "entropy_bonus", "policy_weight", "init_std", "jitter"}
    detail = {"scorer_dim", "dtype", "n_groups", "top_groups", "group_score"}  # of what is compared already; precision is the run's
    moe = tiny(moe={}).moe
    assert moe is not None
    found = evaluated(tiny(moe={}))["moe"]
    assert set(type(moe).model_fields) - set(found) == {"first_k_dense"}  # `every` lists the layers
    assert set(type(moe.router).model_fields) - set(found["router"]) == training | detail
