"""Bytes: on a device, in a checkpoint, between devices, in a cache."""

from __future__ import annotations

from spec.accounting.attention import sights
from spec.accounting.count import n_moe_layers, n_mtp_moe_layers
from spec.attention import LatentAttention, LightningAttention
from spec.experiment import ExperimentSpec
from spec.model import Model
from spec.moe import GATED


def activation_bytes(spec: ExperimentSpec) -> int:
    """What one micro-batch keeps for the backward pass on one device; an estimate, without the allocator's waste.

    Per token and layer: two residual inputs and two normalised inputs (4 d); queries, keys, values and the attention's
    output; for each feed-forward path its pre-activations and their product (3 or 2 of its width), and for a routed one
    the gathered input and the output (2 d); float32 router scores and probabilities (2 E). Once: float32 logits and
    their gradient (2 V). With activation_recompute a layer keeps its input (d), and one layer's own is held at a time.
    A block of multi-token prediction is a layer more, with the vectors that its projection joins (2 d) and logits of its own.
    """
    model, moe, width = spec.model, spec.model.moe, spec.training.product_bytes
    tokens = spec.training.batch_size // spec.training.grad_accumulation // spec.parallel.world_size * spec.data.seq_len
    d, layers = model.d_model, model.n_layers + model.encoder_layers + model.mtp_depth
    sparse = n_moe_layers(model) + n_mtp_moe_layers(model)
    attentions = layers + (model.n_layers if model.encoder_layers else 0)
    attention = width * _attention_width(model)
    dense = width * (4 * d + (3 if model.gated else 2) * model.d_ff)
    routed = 0
    if moe is not None:
        saved = 3 if (moe.activation or model.activation) in GATED else 2
        paths = moe.top_k * (saved * moe.d_expert + 2 * d) + moe.n_shared * saved * moe.shared_width
        routed = width * (4 * d + paths) + 8 * moe.n_experts
    logits = 8 * model.vocab_size * (1 + model.mtp_depth) + width * 2 * d * model.mtp_depth
    if spec.training.activation_recompute:
        return tokens * (width * d * layers + attention + max(dense if layers > sparse else 0, routed) + logits)
    return tokens * (attention * attentions + dense * (layers - sparse) + routed * sparse + logits)


def _attention_width(model: Model) -> int:
    """Numbers per token that one attention block keeps: queries, keys, values, output."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        qk = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        latents = attention.q_lora_rank + attention.kv_lora_rank
        return latents + attention.n_heads * (2 * qk + 2 * attention.v_head_dim)
    if isinstance(attention, LightningAttention):
        return 5 * attention.n_heads * attention.head_dim  # of a lightning layer: its output's gate too
    k = attention.experts.top_k if attention.experts else 1
    return 2 * (k * attention.n_heads + attention.n_kv_heads) * model.head_dim


def all_to_all_bytes(spec: ExperimentSpec) -> int:
    """Bytes that leave a device per token and step: dispatch and combine, forward and backward, in all MoE layers.

    With activation_recompute the backward pass sends the forward's rows again.
    """
    ranks = spec.parallel.expert
    if spec.model.moe is None:
        return 0
    passes = 6 if spec.training.activation_recompute else 4
    crossings = passes * spec.model.moe.top_k * (n_moe_layers(spec.model) + n_mtp_moe_layers(spec.model))
    return crossings * spec.model.d_model * spec.training.product_bytes * (ranks - 1) // ranks


def kv_cache_bytes(spec: ExperimentSpec) -> int:
    """Cache that one token adds in all decoder layers (windowed ones too, which later drop it); cross-attention's beside it."""
    layers = sum(sight.layers for sight in sights(spec.model))
    return _cached_numbers(spec.model) * spec.training.product_bytes * layers * (2 if spec.model.encoder_layers else 1)


def kv_cache_bytes_per_sequence(spec: ExperimentSpec) -> int:
    """The most that one sequence of seq_len tokens needs at a time: layers with a window or chunks let go of what no later token sees.

    A lightning layer keeps its state, head_dim x head_dim in every head, however long the sequence is.
    """
    model, s = spec.model, spec.data.seq_len
    tokens = sum(sight.layers * sight.held(s) for sight in sights(model))
    if model.encoder_layers:
        tokens += model.n_layers * s
    numbers = _cached_numbers(model) * tokens
    if isinstance(model.attention, LightningAttention):
        linear = model.n_layers - model.n_layers // model.attention.full_every
        numbers += linear * model.attention.n_heads * model.attention.head_dim**2
    return numbers * spec.training.product_bytes


def _cached_numbers(model: Model) -> int:
    """Per token and layer: keys and values, or the latent with its rotated key."""
    attention = model.attention
    if isinstance(attention, LatentAttention):
        return attention.kv_lora_rank + attention.qk_rope_head_dim
    return 2 * attention.n_kv_heads * model.head_dim
