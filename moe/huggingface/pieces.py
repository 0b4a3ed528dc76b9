"""The parts that families share, as rows of their tables. `at` is a prefix of theirs, `to` one of ours, both with their last dot."""

from __future__ import annotations

from collections.abc import Sequence

from moe.huggingface.layout import SAME, TRANSPOSED, Op, Option, Row, Rows, each_expert, one_matrix, stacked, stacked_rows
from spec.attention import GroupedQueryAttention, LatentAttention
from spec.model import Model


def same(ours: str, *theirs: str) -> Row:
    """One tensor, unchanged, under any of several names."""
    return Row(ours, tuple(Option((name,), SAME) for name in theirs))


def norm(model: Model, ours: str, theirs: str) -> list[Row]:
    """A norm's weight, and its bias where it has one."""
    names = ["weight", "bias"] if model.norm_bias else ["weight"]
    return [same(f"{ours}.{name}", f"{theirs}.{name}") for name in names]


def ends(model: Model, prefix: str, *, embedding: str = "embed_tokens", last: str = "norm", head: str = "lm_head") -> list[Row]:
    """Embedding, final norm and output projection."""
    rows = [same("embedding.weight", f"{prefix}{embedding}.weight"), *norm(model, "norm", f"{prefix}{last}")]
    if not model.tie_embeddings:
        rows.append(same("head", f"{head}.weight"))
    if model.lm_head_bias:
        rows.append(same("head_bias", f"{head}.bias"))
    return rows


# ----- attention


def heads(model: Model, attention: GroupedQueryAttention, *, halves: bool) -> tuple[Rows, Rows, Rows]:
    """Rows of queries, keys and values. `halves`: theirs pairs dimensions i and i + R/2."""
    width, rotated = model.head_dim, model.head_dim if halves else 0
    query, key = attention.n_heads * width, attention.n_kv_heads * width
    return Rows(query, width, rotated), Rows(key, width, rotated), Rows(key)


def grouped(model: Model, at: str, to: str, *, halves: bool = True) -> list[Row]:
    """q_proj, k_proj, v_proj and o_proj, with their biases and norms."""
    attention = model.attention
    assert isinstance(attention, GroupedQueryAttention)
    query, key, value = heads(model, attention, halves=halves)
    rows = [
        Row(f"{to}qkv.{name}", (Option(tuple(f"{at}{x}_proj.{name}" for x in "qkv"), stacked_rows(query, key, value)),))
        for name in (["weight", "bias"] if attention.bias else ["weight"])
    ]
    rows += [same(f"{to}out.{name}", f"{at}o_proj.{name}") for name in (["weight", "bias"] if attention.output_bias else ["weight"])]
    if attention.qk_norm in ("head", "full"):
        rows += [Row(f"{to}{x}_norm.weight", (Option((f"{at}{x}_norm.weight",), stacked_rows(part)),)) for x, part in _norm_rows(model, query, key)]
    if attention.sinks:
        rows.append(same(f"{to}sinks_H", f"{at}sinks"))
    return rows


def _norm_rows(model: Model, query: Rows, key: Rows) -> list[tuple[str, Rows]]:
    if model.attention.kind == "gqa" and model.attention.qk_norm == "head":
        one = Rows(model.head_dim, query.head, query.rotated)
        return [("q", one), ("k", one)]
    return [("q", query), ("k", key)]


def latent(model: Model, at: str, to: str, *, halves: bool) -> list[Row]:
    """The projections of latent attention. `halves`: theirs pairs rotated dimensions i and i + R/2 (rope_interleave false)."""
    attention = model.attention
    assert isinstance(attention, LatentAttention)
    turned = attention.qk_rope_head_dim if halves else 0
    head = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    query = stacked_rows(Rows(attention.n_heads * head, head, turned))
    down = attention.kv_lora_rank + attention.qk_rope_head_dim
    rows = [
        Row(f"{to}kv_down.weight", (Option((f"{at}kv_a_proj_with_mqa.weight",), stacked_rows(Rows(down, down, turned))),)),
        same(f"{to}kv_norm.weight", f"{at}kv_a_layernorm.weight"),
        same(f"{to}kv_up.weight", f"{at}kv_b_proj.weight"),
        same(f"{to}out.weight", f"{at}o_proj.weight"),
    ]
    if not attention.q_lora_rank:
        return [Row(f"{to}q.weight", (Option((f"{at}q_proj.weight",), query),)), *rows]
    return [
        same(f"{to}q_down.weight", f"{at}q_a_proj.weight"),
        same(f"{to}q_norm.weight", f"{at}q_a_layernorm.weight"),
        Row(f"{to}q_up.weight", (Option((f"{at}q_b_proj.weight",), query),)),
        *rows,
    ]


def attention_experts(model: Model, at: str, to: str) -> list[Row]:
    """JetMoE's attention: experts of query and output projections over shared keys and values."""
    attention = model.attention
    assert isinstance(attention, GroupedQueryAttention)
    query, key, value = heads(model, attention, halves=True)
    return [
        same(f"{to}router", f"{at}experts.router.layer.weight"),
        Row(f"{to}w_q", (Option((f"{at}experts.input_linear.weight",), each_expert(query)),)),
        same(f"{to}w_out", f"{at}experts.output_linear.weight"),
        same(f"{to}out_bias", f"{at}experts.bias"),
        Row(f"{to}kv.weight", (Option((f"{at}kv_proj.weight",), one_matrix(key, value)),)),
    ]


# ----- feed-forward


def gated(at: str, to: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> list[Row]:
    """A dense gated layer, or the shared experts."""
    gate, up, down = names
    halves = Op(lambda theirs: stacked(2).join(theirs)[0], lambda ours: stacked(2).split(ours[None]))
    return [Row(f"{to}w_in", (Option((f"{at}{gate}.weight", f"{at}{up}.weight"), halves),)), same(f"{to}w_out", f"{at}{down}.weight")]


def experts(n_experts: int, ats: Sequence[str], to: str, names: Sequence[str], fused: str | None = None) -> list[Row]:
    """Gated experts on the disk one by one (`{at}0.{name}.weight`), or stacked as transformers 5 keeps them (`{fused}gate_up_proj`)."""
    gate, up, down = names
    inward = [Option(tuple(f"{at}{expert}.{name}.weight" for expert in range(n_experts) for name in (gate, up)), stacked(2)) for at in ats]
    outward = [Option(tuple(f"{at}{expert}.{down}.weight" for expert in range(n_experts)), stacked(1)) for at in ats]
    if fused:
        inward.append(Option((f"{fused}gate_up_proj",), SAME))
        outward.append(Option((f"{fused}down_proj",), SAME))
    return [Row(f"{to}w_in", tuple(inward)), Row(f"{to}w_out", tuple(outward))]


def transposed_experts(at: str, to: str) -> list[Row]:
    """Llama 4: [E, D, 2F] and [E, F, D], gate columns first."""
    return [Row(f"{to}w_in", (Option((f"{at}gate_up_proj",), TRANSPOSED),)), Row(f"{to}w_out", (Option((f"{at}down_proj",), TRANSPOSED),))]
