"""Attention: its parameters, what its layers see, and the operations of scores and values."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from spec.accounting.quantity import Count, matrix, vector
from spec.attention import GroupedQueryAttention, LatentAttention, LightningAttention
from spec.model import Model

# ----- parameters


def attention_counts(model: Model, blocks: int, *, last: bool = False) -> tuple[Count, Count]:
    """`blocks` attention blocks together, and the norms inside them; with `last`, blocks of the last layer's kind."""
    attention, d = model.attention, model.d_model
    if isinstance(attention, LightningAttention):
        softmax = softmax_blocks(attention, model, blocks, last=last)
        linear = blocks - softmax
        return _softmax(attention, d) * softmax + _lightning(attention, d) * linear, vector(attention.n_heads * attention.head_dim) * linear
    one, norms = _latent(attention, d) if isinstance(attention, LatentAttention) else _grouped(attention, d, model.head_dim)
    return one * blocks, norms * blocks


def softmax_blocks(attention: LightningAttention, model: Model, blocks: int, *, last: bool = False) -> int:
    """How many of `blocks` blocks have softmax attention; with `last`, all are of the last layer's kind."""
    return blocks * attention.softmax_at(model.n_layers - 1) if last else blocks // attention.full_every


def _latent(attention: LatentAttention, d: int) -> tuple[Count, Count]:
    heads, rank, latent = attention.n_heads, attention.q_lora_rank, attention.kv_lora_rank
    qk = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    query = d * rank + rank * heads * qk if rank else d * heads * qk
    down = d * (latent + attention.qk_rope_head_dim)
    up = latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return matrix(query + down + up + heads * attention.v_head_dim * d), vector(rank + latent)


def _grouped(attention: GroupedQueryAttention, d: int, head_dim: int) -> tuple[Count, Count]:
    query, key = attention.n_heads * head_dim, attention.n_kv_heads * head_dim
    keys_values = matrix(2 * d * key) + vector(2 * key if attention.bias else 0)
    one = matrix(2 * d * query) + vector(query if attention.bias else 0)
    output_bias = vector(d if attention.output_bias else 0)
    sinks = vector(attention.n_heads if attention.sinks else 0)
    norms = {"none": 0, "l2": 0, "head": 2 * head_dim, "full": query + key}[attention.qk_norm]
    if attention.experts is not None:
        n, k = attention.experts.n_experts, attention.experts.top_k
        one = one.choose(k, n) + matrix(d * n)
    return keys_values + one + output_bias + sinks, vector(norms)


def _softmax(attention: LightningAttention, d: int) -> Count:
    return matrix(2 * d * (attention.n_heads + attention.n_kv_heads) * attention.head_dim)


def _lightning(attention: LightningAttention, d: int) -> Count:
    """Queries, keys, values, output gate and output, all of the full width."""
    return matrix(5 * d * attention.n_heads * attention.head_dim)


# ----- what the layers see


@dataclass(frozen=True)
class Sight:
    """`layers` layers that attend causally, within the last `window` tokens and within blocks of `chunk`; None for all."""

    layers: int
    window: int | None = None
    chunk: int | None = None

    def pairs(self, s: int) -> int:
        """Pairs of query and key in one layer over a sequence of `s` tokens."""
        block = min(self.chunk or s, s)
        return s // block * self._triangle(block) + self._triangle(s % block)

    def held(self, s: int) -> int:
        """Tokens, of a sequence of `s`, whose keys and values one layer needs at most at a time."""
        return min(self.window or s, self.chunk or s, s)

    def _triangle(self, s: int) -> int:
        window = min(self.window or s, s)
        return s * window - window * (window - 1) // 2


def sights(model: Model) -> list[Sight]:
    """The decoder's layers with softmax attention by what they see."""
    attention, n = model.attention, model.n_layers
    if isinstance(attention, LightningAttention):
        return [Sight(n // attention.full_every)]
    if isinstance(attention, LatentAttention):
        return [Sight(n)]
    return _grouped_sights(attention, n)


def last_sight(model: Model) -> Sight:
    """One layer of the last layer's kind."""
    attention, last = model.attention, model.n_layers - 1
    if isinstance(attention, GroupedQueryAttention):
        return Sight(1, attention.window_at(last), attention.chunk_at(last))
    return Sight(int(attention.softmax_at(last)) if isinstance(attention, LightningAttention) else 1)


def _grouped_sights(attention: GroupedQueryAttention, n: int) -> list[Sight]:
    window, chunk, nope = attention.sliding_window, attention.chunk, attention.nope_every
    full, unrotated = n // attention.full_every, n // nope if nope else 0
    both = n // lcm(attention.full_every, nope) if nope else 0
    kinds = [
        Sight(n - full - unrotated + both, window, chunk),
        Sight(full - both, None, chunk),
        Sight(unrotated - both, window, None),
        Sight(both),
    ]
    return [kind for kind in kinds if kind.layers]


# ----- operations


def attention_flops(model: Model, s: int) -> int:
    """Scores and values of all layers per token, forward, rounded down to a whole number."""
    pairs = sum(sight.layers * sight.pairs(s) for sight in sights(model))
    if model.encoder_layers:
        pairs += (model.encoder_layers + model.n_layers) * s * s
    attention = model.attention
    recurrent = 0
    if isinstance(attention, LightningAttention):
        recurrent = (model.n_layers - model.n_layers // attention.full_every) * _recurrent_flops(attention)
    return _flops_per_pair(model) * pairs // s + recurrent


def mtp_attention_flops(model: Model, s: int) -> int:
    """The same of the blocks of multi-token prediction."""
    sight, attention = last_sight(model), model.attention
    if isinstance(attention, LightningAttention) and not sight.layers:
        return model.mtp_depth * _recurrent_flops(attention)
    return model.mtp_depth * _flops_per_pair(model) * sight.pairs(s) // s


def _flops_per_pair(model: Model) -> int:
    """Of one query and one key in all heads of a layer: the score, and the value's share."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        return 2 * attention.n_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim)
    grouped = isinstance(attention, GroupedQueryAttention)
    heads = attention.n_heads * (attention.experts.top_k if isinstance(attention, GroupedQueryAttention) and attention.experts else 1)
    return 2 * heads * 2 * (model.head_dim if grouped else attention.head_dim or 0)


def _recurrent_flops(attention: LightningAttention) -> int:
    """Per token of one lightning layer: the outer product of key and value joins the state, and the query reads it."""
    return 4 * attention.n_heads * attention.head_dim**2
