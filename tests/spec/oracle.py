"""The accountant's oracle: every tensor of a small model listed one by one, every attended pair of tokens counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from spec.experiment import ExperimentSpec
from spec.model import Model
from spec.routing import Router


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
            yield from _layer(model, layer, 2 if stack == "decoder" and model.encoder_layers else 1)
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


def _layer(model: Model, layer: int, blocks: int) -> Iterator[Tensor]:
    for _ in range(blocks):
        yield from _attention(model, layer)
    for _ in range((blocks + 1) * (2 if model.sandwich_norm else 1)):
        yield from _norm(model)
    if is_sparse(model, layer):
        yield from _moe(model)
    else:
        yield from _ffn("dense_ffn", model.d_model, model.d_ff, model.activation)


def mtp_tensors(model: Model) -> Iterator[Tensor]:
    """What is trained beside `tensors` to predict tokens further ahead."""
    for _ in range(model.mtp_depth):
        yield Tensor("projection", (model.d_model, 2 * model.d_model))
        yield from _layer(model, model.n_layers - 1, 1)
        for _ in range(3):
            yield from _norm(model)


def is_sparse(model: Model, layer: int) -> bool:
    """Whether layer `layer` (from 0) of either stack is MoE."""
    moe = model.moe
    return moe is not None and layer >= moe.first_k_dense and (layer - moe.first_k_dense + 1) % moe.every == 0


def _norm(model: Model) -> Iterator[Tensor]:
    yield Tensor("norms", (model.d_model,), multiplied=False)
    if model.norm_bias:
        yield Tensor("norms", (model.d_model,), multiplied=False)


def _ffn(part: str, d: int, width: int, activation: str, *, active: bool = True) -> Iterator[Tensor]:
    if activation in ("swiglu", "geglu", "swiglu_clamped"):
        yield Tensor(part, (width, d), active)
    yield Tensor(part, (width, d), active)
    yield Tensor(part, (d, width), active)


def _moe(model: Model) -> Iterator[Tensor]:
    moe, d = model.moe, model.d_model
    assert moe is not None
    activation = moe.activation or model.activation
    for expert in range(moe.n_experts):
        active = expert < moe.top_k
        yield from _scores(moe.router, d)
        yield from _ffn("experts", d, moe.d_expert, activation, active=active)
        if moe.bias == "expert":
            for width in [moe.d_expert] * (1 if activation in ("relu", "gelu") else 2) + [d]:
                yield Tensor("experts", (width,), active, multiplied=False)
    if moe.router.scorer != "linear":
        yield Tensor("routers", (moe.router.scorer_dim, d))
    if moe.router.scorer == "cosine":
        yield Tensor("routers", (), multiplied=False)
    if moe.bias == "layer":
        yield Tensor("experts", (d,), multiplied=False)
    for _ in range(moe.n_shared):
        yield from _ffn("shared_experts", d, moe.d_shared or moe.d_expert, activation)
    if moe.combine == "sigmoid_gate":
        yield Tensor("shared_experts", (1, d))
    if moe.combine == "residual":
        yield Tensor("shared_experts", (2, d))
        yield Tensor("shared_experts", (2,), multiplied=False)


def _scores(router: Router, d: int) -> Iterator[Tensor]:
    """What scores one expert."""
    if router.kind in ("hash", "random"):
        return
    yield Tensor("routers", (1, d if router.scorer == "linear" else router.scorer_dim))
    if router.kind == "noisy_topk":
        yield Tensor("routers", (1, d))
    if router.bias:
        yield Tensor("routers", (1,), multiplied=False)


def _attention(model: Model, layer: int) -> Iterator[Tensor]:
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
    if a.kind == "lightning":
        rest = a.n_kv_heads if (layer + 1) % a.full_every == 0 else a.n_heads
        for width in (a.n_heads, a.n_heads, rest, rest):  # queries, output; keys, values
            yield Tensor("attention", (width * a.head_dim, d))
        if (layer + 1) % a.full_every:
            yield Tensor("attention", (a.n_heads * a.head_dim, d))  # the output's gate
            yield Tensor("norms", (a.n_heads * a.head_dim,), multiplied=False)
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
    per_pair = _flops_per_pair(model)
    flops = sum(per_pair * seen(model, layer, s) for layer in range(model.n_layers))
    if model.encoder_layers:
        flops += per_pair * (model.encoder_layers + model.n_layers) * s * s
    return 2 * products + flops // s + _recurrent(model, range(model.n_layers))


def training_flops(spec: ExperimentSpec) -> int:
    """Three times the forward pass, which in training has the blocks that predict further ahead."""
    model, s = spec.model, spec.data.seq_len
    products = sum(t.size for t in mtp_tensors(model) if t.multiplied and t.active) + model.mtp_depth * model.vocab_size * model.d_model
    last = model.n_layers - 1
    attention = model.mtp_depth * _flops_per_pair(model) * seen(model, last, s) // s + model.mtp_depth * _recurrent(model, [last])
    return 3 * (forward_flops(spec) + 2 * products + attention)


def _flops_per_pair(model: Model) -> int:
    a = model.attention
    if a.kind == "mla":
        return 2 * a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
    experts = a.experts.top_k if a.kind == "gqa" and a.experts else 1
    return 2 * a.n_heads * experts * 2 * (a.head_dim or model.d_model // a.n_heads)


def _recurrent(model: Model, layers: Iterable[int]) -> int:
    """Of lightning attention, per token: a state of head_dim x head_dim is written to and read in each head."""
    a = model.attention
    if a.kind != "lightning":
        return 0
    return sum(4 * a.n_heads * a.head_dim * a.head_dim for layer in layers if (layer + 1) % a.full_every)


def sees(model: Model, layer: int, query: int, key: int) -> bool:
    """Whether the softmax of decoder layer `layer` lets token `query` attend to token `key`."""
    a = model.attention
    if key > query or (a.kind == "lightning" and (layer + 1) % a.full_every):
        return False
    if a.kind != "gqa":
        return True
    if a.sliding_window is not None and (layer + 1) % a.full_every and query - key >= a.sliding_window:
        return False
    rotates = a.nope_every == 0 or (layer + 1) % a.nope_every != 0
    return a.chunk is None or not rotates or query // a.chunk == key // a.chunk


def seen(model: Model, layer: int, s: int) -> int:
    """Pairs of tokens that attend."""
    return sum(sees(model, layer, query, key) for query in range(s) for key in range(query + 1))


def cached_bytes(spec: ExperimentSpec) -> int:
    """The most, over the tokens of a sequence, that is needed at a time: keys and values, or latents, that the token sees, and states."""
    model, s, a = spec.model, spec.data.seq_len, spec.model.attention
    if a.kind == "mla":
        width = a.kv_lora_rank + a.qk_rope_head_dim
    else:
        width = 2 * a.n_kv_heads * (a.head_dim or model.d_model // a.n_heads)
    numbers = 0
    for layer in range(model.n_layers):
        numbers += width * max(sum(sees(model, layer, query, key) for key in range(s)) for query in range(s))
        if model.encoder_layers:
            numbers += width * s
        if a.kind == "lightning" and (layer + 1) % a.full_every:
            numbers += a.n_heads * a.head_dim * a.head_dim
    return numbers * (2 if spec.training.precision == "bfloat16" else 4)
