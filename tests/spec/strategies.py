"""Small valid specs, drawn from the whole language."""

from __future__ import annotations

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from pydantic import ValidationError

from spec.experiment import ExperimentSpec


def small(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


ATTENTION_EXPERTS = st.none() | st.fixed_dictionaries({"n_experts": small(2, 4), "top_k": small(1, 2)})
GQA = st.fixed_dictionaries(
    {
        "kind": st.just("gqa"),
        "n_heads": st.sampled_from([2, 4]),
        "n_kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([None, 6, 8]),
        "bias": st.booleans(),
        "output_bias": st.booleans(),
        "qk_norm": st.sampled_from(["none", "head", "full", "l2"]),
        "sinks": st.booleans(),
        "sliding_window": st.none() | small(1, 20),
        "full_every": small(1, 3),
        "chunk": st.none() | small(1, 20),
        "nope_every": small(0, 3),
        "experts": ATTENTION_EXPERTS,
    }
)
MLA = st.fixed_dictionaries(
    {
        "kind": st.just("mla"),
        "n_heads": small(1, 3),
        "q_lora_rank": st.sampled_from([0, 5]),
        "kv_lora_rank": small(1, 7),
        "qk_nope_head_dim": small(1, 6),
        "qk_rope_head_dim": st.sampled_from([2, 4]),
        "v_head_dim": small(1, 6),
    }
)
LIGHTNING = st.fixed_dictionaries(
    {
        "kind": st.just("lightning"),
        "n_heads": st.sampled_from([2, 4]),
        "n_kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([6, 8]),
        "full_every": small(1, 3),
    }
)
ACTIVATION = st.sampled_from(["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"])
SCORED = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["topk_softmax", "noisy_topk", "sigmoid_input", "expert_choice", "sinkhorn"]),
        "scorer": st.sampled_from(["linear", "cosine", "mlp"]),
        "scorer_dim": small(1, 9),
        "bias": st.booleans(),
    }
)
ROUTER = SCORED | st.fixed_dictionaries({"kind": st.sampled_from(["hash", "random"])})
MOE = st.fixed_dictionaries(
    {
        "n_experts": st.sampled_from([4, 8]),
        "top_k": small(1, 4),
        "d_expert": small(1, 12),
        "n_shared": small(0, 2),
        "d_shared": st.none() | small(1, 9),
        "activation": st.none() | ACTIVATION,
        "bias": st.sampled_from(["none", "expert", "layer"]),
        "first_k_dense": small(0, 2),
        "every": small(1, 2),
        "router": ROUTER,
    }
) | st.fixed_dictionaries({"n_shared": small(1, 2), "combine": st.sampled_from(["sigmoid_gate", "residual"]), "d_expert": small(1, 12)})
MODEL = st.fixed_dictionaries(
    {
        "n_layers": small(1, 4),
        "encoder_layers": st.just(0) | small(0, 3),
        "d_model": st.sampled_from([8, 16, 24]),
        "vocab_size": small(257, 300),
        "tie_embeddings": st.booleans(),
        "attention": GQA | MLA | LIGHTNING,
        "d_ff": small(1, 20),
        "activation": ACTIVATION,
        "norm": st.just("layernorm"),
        "norm_bias": st.booleans(),
        "sandwich_norm": st.booleans(),
        "position": st.sampled_from(["rope", "t5_relative"]),
        "lm_head_bias": st.booleans(),
        "mtp_depth": small(0, 2),
        "moe": st.none() | MOE,
    }
)


@st.composite
def specs(draw: st.DrawFn) -> ExperimentSpec:
    """A spec that validates."""
    model: dict[str, Any] = draw(MODEL)
    ranks = draw(st.sampled_from([1, 2, 4])) if model["moe"] else 1
    if model["moe"] and model["moe"].get("router", {}).get("kind") in ("hash", "random"):
        model["moe"]["balance"] = []
    plain = {
        "model": model,
        "data": {"seq_len": draw(small(8, 24))},
        "training": {
            "batch_size": 8,
            "precision": draw(st.sampled_from(["float32", "tf32", "bfloat16"])),
            "activation_recompute": draw(st.booleans()),
        },
        "parallel": {"expert": ranks, "shard": draw(st.booleans())},
    }
    try:
        return ExperimentSpec.model_validate(plain)
    except ValidationError:
        assume(False)
        raise
