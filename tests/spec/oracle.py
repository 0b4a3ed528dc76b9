"""The accountant's oracle: every tensor of a small model listed one by one, every attended pair of tokens counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from spec.experiment import ExperimentSpec
from spec.model import Model


@dataclass(frozen=True)
class Tensor:
    """One parameter. `active`: a token that uses the first k experts uses it; `multiplied`: in a matrix product."""

    part: str
    shape: tuple[int, ...]
    active: bool = True
    multiplied: bool = True

    @property
    def size(self) -> int:
        return prod(self.shape)


def tensors(model: Model) -> Iterator[Tensor]:
    """All parameters of `model`."""
    d, v = model.d_model, model.vocab_size
    yield Tensor("embedding", (v, d), multiplied=False)
    for stack, layers in (("decoder", model.n_layers), ("encoder", model.encoder_layers)):
        for layer in range(layers):
            blocks = 2 if stack == "decoder" and model.encoder_layers else 1
            for _ in range(blocks):
                yield from _attention(model)
            for _ in range((blocks + 1) * (2 if model.sandwich_norm else 1)):
                yield from _norm(model)
            if is_sparse(model, layer):
                yield from _moe(model)
            else:
                yield from _ffn("dense_ffn", d, model.d_ff, model.activation)
        if layers:
            yield from _norm(model)
            if model.position == "t5_relative":
                yield Tensor("attention", (32, model.attention.n_heads), multiplied=False)
    if model.tie_embeddings:
        # The same numbers again: nothing to hold, but a product to make.
        yield Tensor("product of the tied head", (v, d), active=False)
    else:
        yield Tensor("head", (v, d))
    if model.lm_head_bias:
        yield Tensor("head", (v,), multiplied=False)


def is_sparse(model: Model, layer: int) -> bool:
    """Whether layer `layer` (from 0) of either stack is MoE."""
    moe = model.moe
    return moe is not None and layer >= moe.first_k_dense and (layer - moe.first_k_dense + 1) % moe.every == 0


def _norm(model: Model) -> Iterator[Tensor]:
    yield Tensor("norms", (model.d_model,), multiplied=False)
    if model.norm_bias:
        yield Tensor("norms", (model.d_model,), multiplied=False)


def _ffn(part: str, d: int, width: int, activation: str, *, active: bool = True) -> Iterator[Tensor]:
    if activation in ("swiglu", "geglu"):
        yield Tensor(part, (width, d), active)
    yield Tensor(part, (width, d), active)
    yield Tensor(part, (d, width), active)


def _moe(model: Model) -> Iterator[Tensor]:
    moe, d = model.moe, model.d_model
    assert moe is not None
    activation = moe.activation or model.activation
    for expert in range(moe.n_experts):
        active = expert < moe.top_k
        yield Tensor("routers", (1, d))
        if moe.router.bias:
            yield Tensor("routers", (1,), multiplied=False)
        yield from _ffn("experts", d, moe.d_expert, activation, active=active)
        if moe.bias == "expert":
            for width in [moe.d_expert] * (2 if activation in ("swiglu", "geglu") else 1) + [d]:
                yield Tensor("experts", (width,), active, multiplied=False)
    if moe.bias == "layer":
        yield Tensor("experts", (d,), multiplied=False)
    for _ in range(moe.n_shared):
        yield from _ffn("shared_experts", d, moe.d_shared or moe.d_expert, activation)
    if moe.combine == "sigmoid_gate":
        yield Tensor("shared_experts", (1, d))


def _attention(model: Model) -> Iterator[Tensor]:
    a, d = model.attention, model.d_model
    if a.kind == "mla":
        rank = a.q_lora_rank
        if rank:
            yield Tensor("attention", (rank, d))
            yield Tensor("norms", (rank,), multiplied=False)
        yield Tensor("attention", (a.kv_lora_rank + a.qk_rope_head_dim, d))
        yield Tensor("norms", (a.kv_lora_rank,), multiplied=False)
        for _ in range(a.n_heads):
            yield Tensor("attention", (a.qk_nope_head_dim + a.qk_rope_head_dim, rank or d))
            yield Tensor("attention", (a.qk_nope_head_dim, a.kv_lora_rank))
            yield Tensor("attention", (a.v_head_dim, a.kv_lora_rank))
            yield Tensor("attention", (d, a.v_head_dim))
        return
    c = a.head_dim or d // a.n_heads
    for expert in range(a.experts.n_experts if a.experts else 1):
        active = a.experts is None or expert < a.experts.top_k
        if a.experts:
            yield Tensor("attention", (1, d))
        for _ in range(a.n_heads):
            yield Tensor("attention", (c, d), active)
            yield Tensor("attention", (d, c), active)
            if a.bias:
                yield Tensor("attention", (c,), active, multiplied=False)
    for _ in range(2 * a.n_kv_heads):
        yield Tensor("attention", (c, d))
        if a.bias:
            yield Tensor("attention", (c,), multiplied=False)
    if a.output_bias:
        yield Tensor("attention", (d,), multiplied=False)
    if a.sinks:
        yield Tensor("attention", (a.n_heads,), multiplied=False)
    if a.qk_norm == "head":
        yield from [Tensor("norms", (c,), multiplied=False)] * 2
    if a.qk_norm == "full":
        yield Tensor("norms", (a.n_heads * c,), multiplied=False)
        yield Tensor("norms", (a.n_kv_heads * c,), multiplied=False)


def by_part(model: Model, *, active: bool) -> Counter[str]:
    """Numbers per part; those of the tied head's product are nobody's."""
    sizes: Counter[str] = Counter()
    for tensor in tensors(model):
        if "product" not in tensor.part and (tensor.active or not active):
            sizes[tensor.part] += tensor.size
    return sizes


def forward_flops(spec: ExperimentSpec) -> int:
    """Multiplications and additions of one sequence, divided by its tokens."""
    model, s = spec.model, spec.data.seq_len
    products = sum(t.size for t in tensors(model) if t.multiplied and (t.active or "product" in t.part))
    a = model.attention
    if a.kind == "mla":
        heads, widths, window, full_every = a.n_heads, a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim, None, 1
    else:
        heads, widths = a.n_heads * (a.experts.top_k if a.experts else 1), 2 * (a.head_dim or model.d_model // a.n_heads)
        window, full_every = a.sliding_window, a.full_every
    pairs = 0
    for layer in range(model.n_layers):
        windowed = window is not None and (layer + 1) % full_every != 0
        for query in range(s):
            for key in range(query + 1):
                pairs += not windowed or query - key < window
        if model.encoder_layers:
            pairs += s * s
    pairs += model.encoder_layers * s * s
    return 2 * products + 2 * heads * widths * pairs // s
