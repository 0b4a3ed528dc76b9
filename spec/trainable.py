"""What can be described and priced, but not trained by the trainer of this version."""

from __future__ import annotations

from collections.abc import Iterator

from spec.experiment import ExperimentSpec
from spec.model import Model
from spec.problems import Problem


def problems(spec: ExperimentSpec) -> list[Problem]:
    """Why the trainer would refuse `spec`, each at its field; empty when it can train it."""
    found = [*model_problems(spec.model)]
    moe = spec.model.moe
    if spec.parallel.expert > 1 and moe is not None and moe.capacity.padded:
        found.append(
            Problem("/model/moe/capacity/padded", f"padded: experts of {spec.parallel.expert} ranks (parallel.expert) run over the rows they get")
        )
    return found


def model_problems(model: Model) -> Iterator[Problem]:
    """What of `model` cannot be built, each at its field."""
    if model.encoder_layers:
        yield _priced_only("/model/encoder_layers", "an encoder-decoder")
    if model.position == "t5_relative":
        yield _priced_only("/model/position", "T5's relative positions")
    if model.attention.kind == "lightning":
        yield _priced_only("/model/attention/kind", "lightning attention")
    if model.moe is None and model.attention.kind == "gqa" and model.attention.experts is not None:
        yield _priced_only("/model/attention/experts", "routing among attention projections in a model without MoE layers")


def _priced_only(pointer: str, what: str) -> Problem:
    return Problem(pointer, f"{pointer.rsplit('/', 1)[1]}: {what} is counted by the accountant, but not trained here")
