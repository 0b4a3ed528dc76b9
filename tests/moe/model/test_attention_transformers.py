"""transformers' attention as oracle: the layers of its small models, with the masks that these models make, against ours.

Rotary pairs are (i, i + C/2) in most of its models and neighbours here, so rows of queries and keys are reordered on the way in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.attention import build_attention
from moe.attention_experts import RoutedAttention
from moe.context import Context
from moe.rope import Rope, rotated_width
from spec.model import Model

transformers = pytest.importorskip("transformers")

LENGTH = 40
SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16}


def neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the first axis of each head from (i, i + C/2) pairs to neighbours."""
    order = torch.arange(head_dim).view(2, -1).t().flatten()
    return rows.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def theirs(name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config, attn_implementation="eager"))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0.0, 0.3)
    return built.eval()


def gpt_oss() -> tuple[nn.Module, dict[str, Any]]:
    moe = {"intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    built = theirs("GptOss", **SIZES, **moe, sliding_window=7, attention_bias=True, rope_parameters={**YARN, "rope_theta": 5000.0})
    attention = {"bias": True, "output_bias": True, "sinks": True, "sliding_window": 7}
    return built, {"attention": attention, "rope_scaling": {"kind": "yarn", "factor": 4, "truncate": False, "trained_len": 16}}


def llama4() -> tuple[nn.Module, dict[str, Any]]:
    moe = {"intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 4, "num_experts_per_tok": 1}
    scales = {"attention_chunk_size": 12, "floor_scale": 8, "attn_scale": 0.1, "attn_temperature_tuning": True, "rms_norm_eps": 1e-5}
    positions = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "max_position_embeddings": 64}
    built = theirs("Llama4Text", **SIZES, **moe, **scales, **positions, use_qk_norm=True, pad_token_id=None)
    return built, {"attention": {"chunk": 12, "nope_every": 4, "temperature_floor": 8, "qk_norm": "l2"}}


def dbrx() -> tuple[nn.Module, dict[str, Any]]:
    parts = {"attn_config": {"clip_qkv": 0.8, "kv_n_heads": 2, "rope_theta": 5000.0}, "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4}}
    built = theirs(
        "Dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=264,
        max_seq_len=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **parts,
    )
    return built, {"attention": {"clip_qkv": 0.8}}


def jetmoe() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16}
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 3, "kv_channels": 8}
    built = theirs("JetMoe", **sizes, **experts, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    attention = {"n_heads": 3, "n_kv_heads": 3, "head_dim": 8, "experts": {"n_experts": 5, "top_k": 2}, "output_bias": True}
    return built, {"attention": attention}


def deepseek() -> tuple[nn.Module, dict[str, Any]]:
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6}
    moe = {"intermediate_size": 16, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    yarn = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4, "original_max_position_embeddings": 16}
    sizes = SIZES | {"num_key_value_heads": 4}
    sizes.pop("head_dim")
    built = theirs("DeepseekV3", **sizes, **ranks, **moe, first_k_dense_replace=0, rope_parameters=yarn, max_position_embeddings=64)
    scaling = {"kind": "yarn", "factor": 4, "trained_len": 16, "mscale": 0.7, "mscale_all_dim": 1.4}
    return built, {"attention": {"kind": "mla", **ranks}, "rope_scaling": scaling, "norm_eps": 1e-6}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "gpt-oss": gpt_oss,
    "llama-4": llama4,
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "deepseek-v3, yarn": deepseek,
}


def weights(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One attention layer's tensors (weights or gradients) under our names and in our layout."""
    if name == "dbrx":
        q, k, v = state["Wqkv.weight"].split([32, 16, 16])
        return {"qkv.weight": torch.cat([neighbours(q, 8), neighbours(k, 8), v]), "out.weight": state["out_proj.weight"]}
    if name == "jetmoe":
        q, (k, v) = state["experts.input_linear.weight"], state["kv_proj.weight"].chunk(2)
        return {
            "router": state["experts.router.layer.weight"],
            "w_q": torch.stack([neighbours(rows, 8) for rows in q]),
            "kv.weight": torch.cat([neighbours(k, 8), v]),
            "w_out": state["experts.output_linear.weight"],
            "out_bias": state["experts.bias"],
        }
    if name.startswith("deepseek"):
        names = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_up": "q_b_proj", "kv_down": "kv_a_proj_with_mqa"}
        names |= {"kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
        return {f"{ours}.weight": state[f"{other}.weight"] for ours, other in names.items()}
    reorder = neighbours if name == "gpt-oss" else lambda rows, _: rows
    found = {"out.weight": state["o_proj.weight"]}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in state:
            q, k, v = (state[f"{x}_proj.{kind}"] for x in "qkv")
            found[f"qkv.{kind}"] = torch.cat([reorder(q, 8), reorder(k, 8), v])
    if "sinks" in state:
        found |= {"sinks_H": state["sinks"], "out.bias": state["o_proj.bias"]}
    return found


def layers_called(built: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Each attention layer of `built` with the arguments that it is called with, in order."""
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((module, ({"hidden_states": args[0]} if args else {}) | kwargs))

    for module in built.modules():
        if type(module).__name__.endswith("Attention") and "Norm" not in type(module).__name__:
            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        built(input_ids=torch.randint(0, 264, (2, LENGTH)), use_cache=False)
    for module, _ in calls:
        module._forward_pre_hooks.clear()
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_as_theirs(name: str) -> None:
    built, parts = MODELS[name]()
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2} if "kind" not in parts["attention"] else {"n_heads": 4}
    plain: dict[str, Any] = {"n_layers": 4, "d_model": 32, "rope_theta": 5000.0, "norm_eps": 1e-5, "moe": {"balance": []}}
    spec = Model.model_validate(plain | parts | {"attention": attention | parts["attention"]})
    rope = Rope(LENGTH, rotated_width(spec), spec.rope_theta, torch.device("cpu"), scaling=spec.rope_scaling)
    context = Context(torch.zeros(2, LENGTH, dtype=torch.int64), rope)
    calls = layers_called(built)
    assert len(calls) == built.config.num_hidden_layers
    for layer, (module, arguments) in enumerate(calls):
        ours = build_attention(spec, layer)
        ours.load_state_dict(weights(name, module.state_dict()))
        x = arguments.pop("hidden_states").detach()
        x = x / x.std()
        theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        wanted = module(theirs_x, **arguments)[0]
        output = ours(ours_x, context)
        got = output[0] if isinstance(ours, RoutedAttention) else output
        assert (got - wanted).norm() < 2e-5 * wanted.norm(), layer
        weight = torch.randn_like(wanted)
        (wanted * weight).sum().backward()
        (got * weight).sum().backward()
        assert theirs_x.grad is not None and ours_x.grad is not None
        assert (ours_x.grad - theirs_x.grad).norm() < 1e-4 * theirs_x.grad.norm(), layer
        gradients = weights(name, {key: p.grad for key, p in module.named_parameters() if p.grad is not None})
        for key, parameter in ours.named_parameters():
            assert parameter.grad is not None
            assert (parameter.grad - gradients[key]).norm() < 1e-4 * gradients[key].norm(), (layer, key)
