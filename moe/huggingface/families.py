"""Every family's table: our tensors, and theirs that they are made of. One function a family, for one block."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe.huggingface.layout import SAME, TRANSPOSED, Option, Row, flat_down, flat_gate_up, interleaved, mxfp4, one_matrix
from moe.huggingface.pieces import attention_experts, ends, experts, gated, grouped, heads, latent, norm, same, transposed_experts
from spec.attention import GroupedQueryAttention
from spec.huggingface import text_config
from spec.model import Model

SWIGLU = ("gate_proj", "up_proj", "down_proj")
Blocks = Callable[[Model, int, Mapping[str, Any], str], list[Row]]


@dataclass(frozen=True)
class Table:
    """What a model is made of on the disk. `left_out` are patterns of names that an import leaves behind, each with the reason."""

    rows: tuple[Row, ...]
    left_out: Mapping[str, str]

    def reason(self, name: str) -> str | None:
        """Why `name` is left behind; None where it is not."""
        return next((reason for pattern, reason in self.left_out.items() if re.search(pattern, name)), None)


def table_of(model: Model, config: Mapping[str, Any], *, prefix: str = "") -> Table:
    """The table for `model`, which `config` describes; `prefix` stands before every name (Llama 4 beside a vision tower)."""
    text = text_config(config)
    kind = str(text["model_type"])
    rows = _ends(model, kind)
    for layer in range(model.n_layers):
        rows += BLOCKS[kind](model, layer, text, f"blocks.{layer}.")
    if prefix:
        rows = [Row(row.ours, tuple(Option(tuple(prefix + name for name in o.theirs), o.op) for o in row.options), row.shape) for row in rows]
    return Table(tuple(rows), _left_out(model, kind, bool(prefix)))


def _left_out(model: Model, kind: str, prefixed: bool) -> dict[str, str]:
    found = {r"rotary_emb\.inv_freq$": "follows from the configuration"}
    if kind == "deepseek_v3":
        layers = "|".join(str(model.n_layers + depth) for depth in range(16))
        found[rf"^model\.layers\.({layers})\."] = (
            "multi-token prediction: their block reads the stream after the last norm, ours before it, so that its weights do not carry over"
        )
    if prefixed:
        found[r"^(vision_model|multi_modal_projector|model\.vision_model|model\.multi_modal_projector)\."] = "the vision tower"
    return found


def _ends(model: Model, kind: str) -> list[Row]:
    if kind == "dbrx":
        return ends(model, "transformer.", embedding="wte", last="norm_f")
    return ends(model, "model.")


def _norms(model: Model, at: str, to: str) -> list[Row]:
    return [*norm(model, f"{to}attention_norm", f"{at}input_layernorm"), *norm(model, f"{to}ffn_norm", f"{at}post_attention_layernorm")]


def _sparse(model: Model, layer: int) -> bool:
    return layer in model.moe_layers()


def _n_experts(model: Model) -> int:
    assert model.moe is not None
    return model.moe.n_experts


def _dense(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at = f"model.layers.{layer}."
    return [*_norms(model, at, to), *grouped(model, f"{at}self_attn.", f"{to}attention."), *gated(f"{at}mlp.", f"{to}ffn.", SWIGLU)]


def _mixtral(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at = f"model.layers.{layer}."
    old, new = f"{at}block_sparse_moe.", f"{at}mlp."
    return [
        *_norms(model, at, to),
        *grouped(model, f"{at}self_attn.", f"{to}attention."),
        same(f"{to}ffn.router.weight", f"{old}gate.weight", f"{new}gate.weight", f"{new}router.weight"),
        *experts(_n_experts(model), [f"{old}experts.", f"{new}experts."], f"{to}ffn.experts.", ("w1", "w3", "w2"), f"{new}experts."),
    ]


def _qwen(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    """OLMoE, Qwen2-MoE, Qwen3-MoE."""
    if not _sparse(model, layer):
        return _dense(model, layer, config, to)
    at = f"model.layers.{layer}."
    rows = [
        *_norms(model, at, to),
        *grouped(model, f"{at}self_attn.", f"{to}attention."),
        same(f"{to}ffn.router.weight", f"{at}mlp.gate.weight"),
        *experts(_n_experts(model), [f"{at}mlp.experts."], f"{to}ffn.experts.", SWIGLU, f"{at}mlp.experts."),
    ]
    if model.moe is not None and model.moe.combine == "sigmoid_gate":
        rows += [*gated(f"{at}mlp.shared_expert.", f"{to}ffn.shared.", SWIGLU), same(f"{to}ffn.shared_gate", f"{at}mlp.shared_expert_gate.weight")]
    return rows


def _deepseek(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at = f"model.layers.{layer}."
    halves = config["model_type"] == "deepseek_v3" and config.get("rope_interleave") is False
    rows = [*_norms(model, at, to), *latent(model, f"{at}self_attn.", f"{to}attention.", halves=halves)]
    if not _sparse(model, layer):
        return [*rows, *gated(f"{at}mlp.", f"{to}ffn.", SWIGLU)]
    rows += [
        same(f"{to}ffn.router.weight", f"{at}mlp.gate.weight"),
        *experts(_n_experts(model), [f"{at}mlp.experts."], f"{to}ffn.experts.", SWIGLU, f"{at}mlp.experts."),
        *gated(f"{at}mlp.shared_experts.", f"{to}ffn.shared.", SWIGLU),
    ]
    if config["model_type"] == "deepseek_v3":
        biased = model.moe is not None and any(term.kind == "loss_free_bias" for term in model.moe.balance)
        option = Option((f"{at}mlp.gate.e_score_correction_bias",), SAME)
        rows.append(Row(f"{to}ffn.router.bias_E" if biased else None, (option,), (_n_experts(model),)))
    return rows


def _dbrx(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at, attention = f"transformer.blocks.{layer}.", model.attention
    assert isinstance(attention, GroupedQueryAttention)
    mlp, n_experts = f"{at}ffn.experts.mlp.", _n_experts(model)
    return [
        *norm(model, f"{to}attention_norm", f"{at}norm_attn_norm.norm_1"),
        *norm(model, f"{to}ffn_norm", f"{at}norm_attn_norm.norm_2"),
        Row(f"{to}attention.qkv.weight", (Option((f"{at}norm_attn_norm.attn.Wqkv.weight",), one_matrix(*heads(model, attention, halves=True))),)),
        same(f"{to}attention.out.weight", f"{at}norm_attn_norm.attn.out_proj.weight"),
        same(f"{to}ffn.router.weight", f"{at}ffn.router.layer.weight"),
        Row(f"{to}ffn.experts.w_in", (Option((f"{mlp}w1", f"{mlp}v1"), flat_gate_up(n_experts)),)),
        Row(f"{to}ffn.experts.w_out", (Option((f"{mlp}w2",), flat_down(n_experts)),)),
    ]


def _llama4(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at = f"model.layers.{layer}."
    rows = [*_norms(model, at, to), *grouped(model, f"{at}self_attn.", f"{to}attention.", halves=False)]
    if not _sparse(model, layer):
        return [*rows, *gated(f"{at}feed_forward.", f"{to}ffn.", SWIGLU)]
    return [
        *rows,
        same(f"{to}ffn.router.weight", f"{at}feed_forward.router.weight"),
        *transposed_experts(f"{at}feed_forward.experts.", f"{to}ffn.experts."),
        *gated(f"{at}feed_forward.shared_expert.", f"{to}ffn.shared.", SWIGLU),
    ]


def _gpt_oss(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at = f"model.layers.{layer}."
    stack = f"{at}mlp.experts."
    return [
        *_norms(model, at, to),
        *grouped(model, f"{at}self_attn.", f"{to}attention."),
        same(f"{to}ffn.router.weight", f"{at}mlp.router.weight"),
        same(f"{to}ffn.router.bias", f"{at}mlp.router.bias"),
        Row(f"{to}ffn.experts.w_in", (Option((f"{stack}gate_up_proj",), interleaved(transposed=True)), _mxfp4(f"{stack}gate_up_proj"))),
        Row(f"{to}ffn.experts.b_in", (Option((f"{stack}gate_up_proj_bias",), interleaved(transposed=False)),)),
        Row(f"{to}ffn.experts.w_out", (Option((f"{stack}down_proj",), TRANSPOSED), _mxfp4(f"{stack}down_proj"))),
        same(f"{to}ffn.experts.b_out", f"{stack}down_proj_bias"),
    ]


def _mxfp4(name: str) -> Option:
    return Option((f"{name}_blocks", f"{name}_scales"), mxfp4(alternating=name.endswith("gate_up_proj")))


def _jetmoe(model: Model, layer: int, config: Mapping[str, Any], to: str) -> list[Row]:
    at = f"model.layers.{layer}."
    return [
        *_norms(model, at, to),
        *attention_experts(model, f"{at}self_attention.", f"{to}attention."),
        same(f"{to}ffn.router.weight", f"{at}mlp.router.layer.weight"),
        same(f"{to}ffn.experts.w_in", f"{at}mlp.input_linear.weight"),
        same(f"{to}ffn.experts.w_out", f"{at}mlp.output_linear.weight"),
        same(f"{to}ffn.bias", f"{at}mlp.bias"),
    ]


BLOCKS: Mapping[str, Blocks] = {
    "llama": _dense,
    "mistral": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "mixtral": _mixtral,
    "phimoe": _mixtral,
    "olmoe": _qwen,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "dbrx": _dbrx,
    "llama4_text": _llama4,
    "gpt_oss": _gpt_oss,
    "jetmoe": _jetmoe,
}
