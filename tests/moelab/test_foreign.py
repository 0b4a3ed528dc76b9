"""Recording somebody else's model: the counts are those of transformers' own routers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moelab import attach

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def mixtral() -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def olmoe() -> torch.nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=3))


def deepseek() -> torch.nn.Module:
    sizes = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SMALL, **sizes, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1, first_k_dense_replace=1
        )
    )


@pytest.mark.parametrize(("make", "layers", "experts", "top_k"), [(mixtral, [0, 1, 2], 4, 2), (olmoe, [0, 1, 2], 8, 3), (deepseek, [1, 2], 8, 2)])
def test_each_tokens_choices_are_counted(make: object, layers: list[int], experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    model = make().train()  # type: ignore[operator]
    routing = attach(model)
    assert routing.shape == {"moe_layers": layers, "n_experts": experts, "top_k": top_k}
    chosen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda _m, _i, out, name=name: chosen.setdefault(name, []).append(out[2]))
    tokens = torch.randint(0, 64, (2, 10))
    model(input_ids=tokens, labels=tokens).loss.backward()
    model(input_ids=tokens)
    counts = routing.take()["expert_tokens"]
    expected = [[int((torch.cat(found) == expert).sum()) for expert in range(experts)] for _, found in sorted(chosen.items())]
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum(axis=1).tolist() == [2 * 20 * top_k] * len(layers)
    assert routing.take()["expert_tokens"].sum() == 0
    model.eval()(input_ids=tokens)
    assert routing.take()["expert_tokens"].sum() == 0, "evaluation is not training"
    routing.detach()
    model.train()(input_ids=tokens)
    assert routing.take()["expert_tokens"].sum() == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_counted_once(reentrant: bool) -> None:
    model = mixtral().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    routing = attach(model)
    tokens = torch.randint(0, 64, (2, 10))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert routing.take()["expert_tokens"].sum(axis=1).tolist() == [40, 40, 40]


def test_a_dense_model_has_nothing_to_watch() -> None:
    with pytest.raises(ValueError, match="no router"):
        attach(torch.nn.Sequential(torch.nn.Linear(2, 2)))
