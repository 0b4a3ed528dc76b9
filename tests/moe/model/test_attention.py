"""Attention layers against loops over tokens, heads and keys in float64: what each feature does, said once more in plain words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.dispatch import implementations
from moe.attention import build_attention, is_masked
from moe.attention_experts import AttentionRouting, RoutedAttention, figures
from moe.context import Context
from moe.rope import Rope, rotated_width
from spec.model import Model

GQA: dict[str, Any] = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 4}
MLA: dict[str, Any] = {
    "kind": "mla",
    "n_heads": 3,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}
MOA: dict[str, Any] = GQA | {"experts": {"n_experts": 5, "top_k": 2}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 3, "full_every": 2},
    "sinks, biases": {"sinks": True, "bias": True, "output_bias": True},
    "chunks without some positions": {"chunk": 4, "nope_every": 2, "temperature_floor": 3, "qk_norm": "l2"},
    "clipped": {"clip_qkv": 0.6},
    "normalised per head, window, sinks": {"qk_norm": "head", "sliding_window": 4, "full_every": 5, "sinks": True},
    "normalised in full": {"qk_norm": "full"},
}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4, 9]])


def described(attention: dict[str, Any], **changes: Any) -> Model:
    plain: dict[str, Any] = {"d_model": 8, "rope_theta": 50.0, "moe": {"n_experts": 2, "balance": [{"kind": "switch_aux", "coefficient": 0.5}]}}
    return Model.model_validate(plain | changes | {"attention": attention})


def layer_of(spec: Model, layer: int) -> nn.Module:
    """In float64 with weights of size one."""
    torch.manual_seed(layer)
    built = build_attention(spec, layer).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.5)
    return built


def context(spec: Model, batch: int, length: int, documents: Tensor | None = None) -> Context:
    rope = Rope(length, rotated_width(spec), spec.rope_theta, torch.device("cpu"), scaling=spec.rope_scaling)
    return Context(torch.zeros(batch, length, dtype=torch.int64), rope, documents)


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Neighbouring pairs of one head turned by position * theta^(-2i/C)."""
    y = x.clone()
    for i in range(len(x) // 2):
        # Angles are float32 in the product; the difference is below the tolerance.
        angle = position * theta ** (-2 * i / len(x))
        y[2 * i] = x[2 * i] * math.cos(angle) - x[2 * i + 1] * math.sin(angle)
        y[2 * i + 1] = x[2 * i] * math.sin(angle) + x[2 * i + 1] * math.cos(angle)
    return y


def normal(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / torch.sqrt((x * x).mean() + eps)
    return y if weight is None else y * weight


def softmaxed(scores: list[Tensor], sink: Tensor | None) -> list[Tensor]:
    weights = [torch.exp(score) for score in scores]
    total = sum(weights) + (0.0 if sink is None else torch.exp(sink))
    return [weight / total for weight in weights]


def seen(spec: Model, layer: int, query: int, documents: Tensor | None) -> list[int]:
    """The keys that the query at `query` attends to."""
    attention: Any = spec.attention
    keys = list(range(query + 1))
    if attention.kind == "gqa":
        rotates = attention.nope_every == 0 or (layer + 1) % attention.nope_every != 0
        if attention.sliding_window and (layer + 1) % attention.full_every != 0:
            keys = keys[-attention.sliding_window :]
        if attention.chunk and rotates:
            keys = [key for key in keys if key // attention.chunk == query // attention.chunk]
    return keys if documents is None else [key for key in keys if documents[key] == documents[query]]


def grouped_loop(spec: Model, built: Any, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """One sequence: projections q [S, H * C], k and v [S, G * C] to the heads' outputs [S, H * C]."""
    attention: Any = spec.attention
    width, eps, length = spec.head_dim, spec.norm_eps, len(q)
    rotates = attention.nope_every == 0 or (layer + 1) % attention.nope_every != 0
    limit = attention.clip_qkv or math.inf
    q, k, v = (part.clamp(-limit, limit) for part in (q, k, v))
    if attention.qk_norm == "full":
        q, k = (torch.stack([normal(row, norm.weight, eps) for row in part]) for part, norm in ((q, built.q_norm), (k, built.k_norm)))

    def head(part: Tensor, position: int, number: int, norm: Any, *, query: bool) -> Tensor:
        x = part[position, number * width : (number + 1) * width]
        if attention.qk_norm == "head":
            x = normal(x, norm.weight, eps)
        if rotates:
            x = turned(x, position, spec.rope_theta)
            return normal(x, None, eps) if attention.qk_norm == "l2" else x
        floor = attention.temperature_floor
        return x * (1 + 0.1 * math.log(math.floor((position + 1) / floor) + 1)) if floor and query else x

    out = []
    for i in range(length):
        row = []
        for h in range(attention.n_heads):
            g = h // (attention.n_heads // attention.n_kv_heads)
            query = head(q, i, h, getattr(built, "q_norm", None), query=True)
            keys = seen(spec, layer, i, documents)
            scores = [query @ head(k, j, g, getattr(built, "k_norm", None), query=False) / math.sqrt(width) for j in keys]
            weights = softmaxed(scores, built.sinks_H[h] if attention.sinks else None)
            row.append(sum(weight * v[j, g * width : (g + 1) * width] for weight, j in zip(weights, keys, strict=True)))
        out.append(torch.cat(row))
    return torch.stack(out)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_grouped_query_attention(name: str, layer: int, documents: Tensor | None) -> None:
    spec = described(GQA | CASES[name])
    built: Any = layer_of(spec, layer)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    got = built(x, context(spec, 2, 10, documents))
    for b in range(2):
        q, k, v = built.qkv(x[b]).split([16, 8, 8], dim=-1)
        wanted = built.out(grouped_loop(spec, built, layer, q, k, v, None if documents is None else documents[b]))
        torch.testing.assert_close(got[b], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one", "documents"])
def test_latent_attention(documents: Tensor | None) -> None:
    spec = described(MLA)
    built: Any = layer_of(spec, 0)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    got = built(x, context(spec, 2, 10, documents))
    for b in range(2):
        rows = []
        for i in range(10):
            query = built.q_up(normal(built.q_down(x[b, i]), built.q_norm.weight, spec.norm_eps)).view(3, 6)
            heads = []
            for h in range(3):
                keys = seen(spec, 0, i, None if documents is None else documents[b])
                scores, values = [], []
                for j in keys:
                    down = built.kv_down(x[b, j])
                    up = built.kv_up(normal(down[:5], built.kv_norm.weight, spec.norm_eps)).view(3, 7)
                    rotary = turned(query[h, 4:], i, spec.rope_theta) @ turned(down[5:], j, spec.rope_theta)
                    scores.append((query[h, :4] @ up[h, :4] + rotary) / math.sqrt(6))
                    values.append(up[h, 4:])
                heads.append(sum(w * value for w, value in zip(softmaxed(scores, None), values, strict=True)))
            rows.append(torch.cat(heads))
        torch.testing.assert_close(got[b], built.out(torch.stack(rows)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"sinks": True, "bias": True, "output_bias": True}, {"qk_norm": "full", "sliding_window": 3, "clip_qkv": 1.0}]
)
def test_attention_experts(changes: dict[str, Any]) -> None:
    """Each token's pairs of projections one after the other; queries of all tokens as if all had chosen the pair of the one looked at."""
    spec = described(MOA | changes)
    built: Any = layer_of(spec, 0)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    got, routing = built(x, context(spec, 2, 10, DOCUMENTS))
    counts, entropies, probabilities = torch.zeros(5), [], []
    for b in range(2):
        k, v = built.kv(x[b]).chunk(2, dim=-1)
        per_expert = []
        for e in range(5):
            q = x[b] @ built.w_q[e].T + (built.q_bias[e] if changes.get("bias") else 0.0)
            per_expert.append(grouped_loop(spec, built, 0, q, k, v, DOCUMENTS[b]) @ built.w_out[e].T)
        for i in range(10):
            logits = (built.router @ x[b, i]).detach()
            chosen = sorted(range(5), key=lambda e: -float(logits[e]))[:2]
            gates = [torch.exp(logits[e]) / sum(torch.exp(logits[f]) for f in chosen) for e in chosen]
            wanted = sum(gate * per_expert[e][i] for gate, e in zip(gates, chosen, strict=True))
            torch.testing.assert_close(got[b, i], wanted + (built.out_bias if changes.get("output_bias") else 0.0), rtol=1e-5, atol=1e-5)
            prob = torch.exp(logits) / torch.exp(logits).sum()
            probabilities.append(prob)
            entropies.append(float(-(prob * prob.log()).sum()))
            counts[chosen] += 1
    assert torch.equal(routing.tokens_E.float(), counts)
    assert float(routing.entropy) == pytest.approx(sum(entropies) / 20)
    aux = 5 * sum(float(counts[e]) / 40 * float(torch.stack(probabilities)[:, e].mean()) for e in range(5))
    assert float(routing.loss.detach()) == pytest.approx(0.5 * aux)


FEATURES: list[dict[str, Any]] = [
    GQA | {"sliding_window": 2, "full_every": 5, "sinks": True, "qk_norm": "head"},
    GQA | {"chunk": 3, "nope_every": 5, "qk_norm": "l2"},
    MLA,
    MOA | {"qk_norm": "full"},
]


@pytest.mark.parametrize("attention", FEATURES, ids=["sinks", "chunks", "latent", "experts"])
def test_gradients(attention: dict[str, Any]) -> None:
    """The routed choice is piecewise constant, so a small step leaves it as it is."""
    spec = described(attention, rope_scaling={"kind": "yarn", "factor": 2, "trained_len": 4, "mscale": 1, "mscale_all_dim": 0.5})
    built: Any = layer_of(spec, 0)
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in built.named_parameters()]
    here = context(spec, 1, 5, torch.tensor([[0, 0, 0, 1, 1]]))

    def run(x: Tensor, *values: Tensor) -> Tensor:
        y: Any = torch.func.functional_call(built, dict(zip(names, values, strict=True)), (x, here))
        return y[0] if isinstance(y, tuple) else y

    assert torch.autograd.gradcheck(run, (x, *built.parameters()), eps=1e-5, atol=1e-4, rtol=1e-3, fast_mode=True)


def test_figures_of_attention_experts() -> None:
    def routing(tokens: list[int], entropy: float) -> AttentionRouting:
        return AttentionRouting(torch.tensor(0.25), torch.tensor(tokens), torch.tensor(entropy))

    found = figures([routing([4, 4, 4], 1.0), routing([9, 3, 0], 0.5)])
    assert {name: round(float(value), 6) for name, value in found.items()} == {
        "moa_entropy": 0.75,
        "moa_balance": 0.5,
    }


def test_routing_needs_experts() -> None:
    spec = described(GQA)
    assert spec.attention.kind == "gqa"
    with pytest.raises(ValueError, match="attention.experts is null"):
        RoutedAttention(spec, spec.attention, 0)


def test_temperature_needs_layers_without_positions() -> None:
    with pytest.raises(ValueError, match="set nope_every"):
        described(GQA | {"temperature_floor": 4})


@pytest.mark.parametrize(
    ("attention", "changes", "masked"),
    [
        (GQA, {}, False),
        (GQA | {"qk_norm": "head", "clip_qkv": 8.0, "nope_every": 2}, {"rope_scaling": {"kind": "yarn"}}, False),
        (GQA | {"sinks": True}, {}, True),
        (GQA | {"sliding_window": 4}, {}, True),
        (GQA | {"chunk": 4}, {}, True),
        (MLA, {"rope_scaling": {"kind": "yarn", "mscale": 1, "mscale_all_dim": 1}}, True),
    ],
)
def test_the_run_page_is_told_where_attention_is_masked(attention: dict[str, Any], changes: dict[str, Any], masked: bool) -> None:
    told = implementations(masked=is_masked(described(attention, **changes)))
    assert told.get("attention (masked)") == ("blocks" if masked else None)
