"""transformers' published models as oracle: the same weights give the same routing, logits and gradients.

Rotary pairs are (i, i + C/2) in its Llama family and neighbours here, so query and key rows are reordered on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.model import Transformer, build_model
from spec.model import Model

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
PLAIN = {**SIZES, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rms_norm_eps": 1e-6}


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, num_key_value_heads=2, **PLAIN)
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2}
    return transformers.MixtralForCausalLM(config), {"attention": attention, "moe": {"router": {"kind": "topk_softmax"}}}


def olmoe() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OlmoeConfig(
        intermediate_size=24, num_experts=6, num_experts_per_tok=2, num_key_value_heads=4, **PLAIN, eos_token_id=0, pad_token_id=1
    )
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 4, "qk_norm": "full"}
    return transformers.OlmoeForCausalLM(config), {"attention": attention, "moe": {"router": {"kind": "softmax_topk"}}}


def qwen3() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Qwen3MoeConfig(
        moe_intermediate_size=24,
        intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        head_dim=16,
        norm_topk_prob=True,
        **PLAIN,
    )
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "qk_norm": "head"}
    return transformers.Qwen3MoeForCausalLM(config), {"attention": attention, "moe": {"router": {"kind": "softmax_topk", "renormalise": True}}}


def deepseek(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6} | changes
    config = transformers.DeepseekV3Config(
        moe_intermediate_size=24, intermediate_size=48, n_routed_experts=6, num_experts_per_tok=2, num_key_value_heads=4, n_group=3, topk_group=2,
        n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True, **sizes, **PLAIN,
    )  # fmt: skip
    attention = {"kind": "mla", "n_heads": 4, **sizes, "q_lora_rank": sizes["q_lora_rank"] or 0}
    router = {"kind": "sigmoid_topk", "n_groups": 3, "top_groups": 2, "group_score": "top2_sum", "scale": 2.5}
    moe = {"n_shared": 2, "first_k_dense": 1, "router": router, "balance": [{"kind": "loss_free_bias"}]}
    return transformers.DeepseekV3ForCausalLM(config), {"attention": attention, "moe": moe}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "mixtral": mixtral, "olmoe": olmoe, "qwen3": qwen3, "deepseek-v3": deepseek, "deepseek-v3 without query rank": lambda: deepseek(q_lora_rank=None),
}  # fmt: skip


def neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the first axis of each head from (i, i + C/2) pairs to neighbours."""
    order = torch.arange(head_dim).view(2, -1).t().flatten()
    return rows.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def attention_names(get: Callable[[str], Tensor | None], head_dim: int) -> dict[str, Tensor | None]:
    q, k, v = (get(f"{x}_proj.weight") for x in "qkv")
    if q is None or k is None:
        plain = {"q": "q_proj", "q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa"}
        plain |= {"kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
        return {f"{ours}.weight": get(f"{theirs}.weight") for ours, theirs in plain.items()}
    assert v is not None
    found: dict[str, Tensor | None] = {
        "qkv.weight": torch.cat([neighbours(q, head_dim), neighbours(k, head_dim), v]),
        "out.weight": get("o_proj.weight"),
    }
    for name in ("q_norm", "k_norm"):
        norm = get(f"{name}.weight")
        found[f"{name}.weight"] = None if norm is None else neighbours(norm, head_dim)
    return found


def ffn_names(get: Callable[[str], Tensor | None]) -> dict[str, Tensor | None]:
    def joined(at: str) -> dict[str, Tensor | None]:
        gate, up = get(f"{at}gate_proj.weight"), get(f"{at}up_proj.weight")
        return {"w_in": None if gate is None or up is None else torch.cat([gate, up]), "w_out": get(f"{at}down_proj.weight")}

    found = joined("") | {f"shared.{name}": tensor for name, tensor in joined("shared_experts.").items()}
    found |= {"router.weight": get("gate.weight"), "router.bias_E": get("gate.e_score_correction_bias")}
    return found | {"experts.w_in": get("experts.gate_up_proj"), "experts.w_out": get("experts.down_proj")}


def ours_from(theirs: dict[str, Tensor], n_layers: int, head_dim: int) -> dict[str, Tensor]:
    """Tensors of a transformers model (weights or gradients) under our names and in our layout."""
    found: dict[str, Tensor | None] = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head": theirs["lm_head.weight"],
    }
    for layer in range(n_layers):
        at, block = f"model.layers.{layer}.", f"blocks.{layer}."
        found |= {
            block + "attention_norm.weight": theirs[at + "input_layernorm.weight"],
            block + "ffn_norm.weight": theirs[at + "post_attention_layernorm.weight"],
        }
        found |= {f"{block}attention.{k}": v for k, v in attention_names(lambda name, at=at: theirs.get(f"{at}self_attn.{name}"), head_dim).items()}
        found |= {f"{block}ffn.{k}": v for k, v in ffn_names(lambda name, at=at: theirs.get(f"{at}mlp.{name}")).items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def choices(model: nn.Module, kind: str) -> list[tuple[Tensor, Tensor]]:
    """Filled on each forward pass with the (experts, gates) that each expert layer is called with."""
    seen: list[tuple[Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(kind):
            module.register_forward_pre_hook(lambda _, args: seen.append((args[1].detach(), args[2].detach())))
    return seen


def pair(name: str) -> tuple[nn.Module, Transformer]:
    """The transformers model with large random weights, and ours with the same."""
    torch.manual_seed(0)
    theirs, parts = MODELS[name]()
    with torch.no_grad():
        for key, tensor in theirs.named_parameters():
            tensor.normal_(1.0 if "norm" in key else 0.0, 0.15)
        for key, tensor in theirs.named_buffers():
            if key.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1)
    moe = {"n_experts": 6, "top_k": 2, "d_expert": 24, "balance": [], **parts["moe"]}
    spec = Model.model_validate(
        {
            "n_layers": 3,
            "d_model": 32,
            "d_ff": 48,
            "vocab_size": 264,
            "tie_embeddings": False,
            "rope_theta": 5000.0,
            "norm_eps": 1e-6,
            "attention": parts["attention"],
            "moe": moe,
        }
    )
    ours = build_model(spec)
    ours.load_state_dict(ours_from(theirs.state_dict(), 3, spec.head_dim))
    return theirs, ours


@pytest.mark.parametrize("name", MODELS)
def test_same_weights_same_routing_logits_and_gradients(name):
    theirs, ours = pair(name)
    tokens = torch.randint(0, 264, (2, 40))
    their_choices, our_choices = choices(theirs, "mlp.experts"), choices(ours, "ffn.experts")
    wanted, got = theirs(input_ids=tokens, use_cache=False).logits, ours(tokens).logits_BSV
    assert got is not None and len(their_choices) == len(our_choices) == len(ours.moe_layers)
    for (their_expert, their_gate), (our_expert, our_gate) in zip(their_choices, our_choices, strict=True):
        their_order, our_order = their_expert.argsort(-1), our_expert.argsort(-1)
        assert torch.equal(their_expert.gather(-1, their_order), our_expert.gather(-1, our_order))
        torch.testing.assert_close(our_gate.gather(-1, our_order), their_gate.gather(-1, their_order).float(), rtol=1e-4, atol=1e-6)
    assert (got - wanted).norm() < 1e-5 * wanted.norm()

    targets = torch.randint(0, 264, (2, 40))
    F.cross_entropy(wanted.flatten(0, 1), targets.flatten()).backward()
    loss = ours(tokens, targets).lm_loss
    assert loss is not None
    loss.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    their_gradients = ours_from(gradients, 3, ours.spec.head_dim)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        off = (parameter.grad - their_gradients[key]).norm() / their_gradients[key].norm()
        assert off < 1e-4, f"{key}: {off:.1e}"
