"""What can be described and priced, but not trained by the trainer of this version."""

from __future__ import annotations

from collections.abc import Iterator

from spec.attention import GroupedQueryAttention
from spec.experiment import ExperimentSpec
from spec.model import Model
from spec.problems import Problem


def problems(spec: ExperimentSpec) -> list[Problem]:
    """Why the trainer would refuse `spec`, each at its field; empty when it can train it."""
    found = [*model_problems(spec.model)]
    if spec.parallel.expert > 1:
        found.append(_priced_only("/parallel/expert", "expert parallelism"))
    return found


def model_problems(model: Model) -> Iterator[Problem]:
    """What of `model` cannot be built, each at its field."""
    if model.encoder_layers:
        yield _priced_only("/model/encoder_layers", "an encoder-decoder")
    if model.position == "t5_relative":
        yield _priced_only("/model/position", "T5's relative positions")
    if model.mtp_depth:
        yield _priced_only("/model/mtp_depth", "multi-token prediction")
    if model.rope_scaling is not None:
        yield _priced_only("/model/rope_scaling", "scaled rotary positions")
    if model.sandwich_norm:
        yield _priced_only("/model/sandwich_norm", "normalisation after each block")
    if isinstance(model.attention, GroupedQueryAttention):
        yield from _attention(model.attention)
    if model.moe is not None:
        if model.moe.activation not in (None, model.activation):
            yield _priced_only("/model/moe/activation", "an activation of the experts other than the model's")
        if model.moe.bias != "none":
            yield _priced_only("/model/moe/bias", "biases of the experts")
        if model.moe.router.bias:
            yield _priced_only("/model/moe/router/bias", "a bias of the router")


def _attention(attention: GroupedQueryAttention) -> Iterator[Problem]:
    if attention.experts is not None:
        yield _priced_only("/model/attention/experts", "routed attention projections")
    if attention.sinks:
        yield _priced_only("/model/attention/sinks", "attention sinks")
    if attention.qk_norm == "l2":
        yield _priced_only("/model/attention/qk_norm", "l2 normalisation")
    for name in ("clip_qkv", "chunk", "nope_every", "temperature_floor"):
        if getattr(attention, name):
            yield _priced_only(f"/model/attention/{name}", name)
    if attention.sliding_window is not None:
        yield _priced_only("/model/attention/sliding_window", "a sliding window")


def _priced_only(pointer: str, what: str) -> Problem:
    return Problem(pointer, f"{pointer.rsplit('/', 1)[1]}: {what} is counted by the accountant, but not trained here")
