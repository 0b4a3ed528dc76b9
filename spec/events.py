"""Telemetry: what a run says about itself, as events in the past tense.

Every event is one `spec.block`: the header holds the fields and `"event"`, its name; StepDone and SpecialisationCounted carry arrays.
The trainer (or `moelab.Recorder`) writes them to a `spec.spool`; the supervisor ships them; the server stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from spec import block
from spec.text import Storable

Array = NDArray[Any]


class EventError(ValueError):
    """The bytes are not an event of this language."""


# ----- tensors


@dataclass(frozen=True)
class TensorKind:
    """A per-step array. `code` is what the store keeps; `axes` names them; `reduce` says how steps are rolled up."""

    code: int
    name: str
    dtype: str
    axes: tuple[str, ...]
    reduce: Literal["sum", "mean"]
    help: str


PARTS = ("data", "attention", "router", "dispatch", "experts", "combine", "dense", "head", "communication", "waiting", "optimizer", "other")
"""What `part_ms` tells a step into; another list would be another tensor. dense: shared experts and dense layers; waiting: for other ranks."""
PASSES = ("forward", "backward")


TENSORS: Mapping[str, TensorKind] = {
    kind.name: kind
    for kind in (
        TensorKind(
            1,
            "expert_tokens",
            "uint32",
            ("layer", "expert"),
            "sum",
            "Tokens routed to each expert, before any drop; a row sums to tokens x top_k.",
        ),
        TensorKind(2, "router_prob", "float32", ("layer", "expert"), "mean", "Mean router probability of each expert."),
        TensorKind(3, "dropped", "uint32", ("layer", "expert"), "sum", "Assignments that capacity dropped; a part of expert_tokens."),
        TensorKind(4, "expert_bias", "float32", ("layer", "expert"), "mean", "Selection bias of the loss-free balancing."),
        TensorKind(
            5,
            "rank_tokens",
            "uint32",
            ("source", "destination"),
            "sum",
            "Assignments that went from one rank to another, over all layers; where rank_traffic would be too large.",
        ),
        TensorKind(6, "phase_ms", "float32", ("rank", "phase"), "mean", "Milliseconds of each phase of the step; phases as in RunStarted.phases."),
        TensorKind(
            7,
            "balance_loss",
            "float32",
            ("layer", "term"),
            "mean",
            "Value of each balancing term (unweighted); terms as in RunStarted.balance_terms.",
        ),
        TensorKind(8, "router_entropy", "float32", ("layer",), "mean", "Mean over tokens of the entropy of the router's distribution, in nats."),
        TensorKind(
            9,
            "attention_tokens",
            "uint32",
            ("layer", "attention_expert"),
            "sum",
            "Tokens routed to each attention expert; rows are all layers in order, and a row sums to tokens x attention.experts.top_k.",
        ),
        TensorKind(
            10,
            "part_ms",
            "float32",
            ("rank", "part", "pass"),
            "mean",
            "Milliseconds of each part of the step (PARTS), forward and backward, at sampled steps; what belongs to no pass counts as forward.",
        ),
        TensorKind(
            11,
            "rank_traffic",
            "uint32",
            ("layer", "source", "destination"),
            "sum",
            "Assignments that went from one rank to another in each layer, by the ranks that hold the experts.",
        ),
        TensorKind(
            12, "sent_bytes", "float32", ("rank",), "mean", "Bytes of rows that each rank sent to others in all passes of the step, at sampled steps."
        ),
    )
}
TENSOR_BY_CODE: Mapping[int, TensorKind] = {kind.code: kind for kind in TENSORS.values()}


# ----- events


# Bounded so that whatever decodes can be stored: 31 and 63 bits, and times before the year 5138.
Step = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=0, lt=2**63)]
Time = Annotated[float, Field(ge=0, lt=1e11, description="Unix time, seconds.")]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    arrays: ClassVar[Mapping[str, Array]] = {}


class RunStarted(_Event):
    """An attempt has built its model (and loaded its checkpoint) and is about to train."""

    event: Literal["run_started"] = "run_started"
    attempt: Step
    at: Time
    resumed_from_step: Step | None = Field(None, description="Last step of the checkpoint it continues from.")
    world_size: int = Field(1, ge=1, le=65536)
    devices: list[Storable] = Field(default_factory=list, max_length=4096, description="One per rank.")
    total_params: Size = Field(0, description="Of the whole model, whatever a rank holds; those of multi-token prediction are not counted.")
    active_params: Size = Field(0, description="Of the whole model, those that one token uses, embeddings among them.")
    tokens_per_step: Size = 0
    steps: Step = Field(0, description="Steps that the run is to make; 0 where nobody knows.")
    moe_layers: list[Step] = Field(
        default_factory=list, max_length=10_000, description="Index in the model of each row of the [layer, expert] tensors."
    )
    n_experts: Step = 0
    top_k: Step = 0
    phases: list[Storable] = Field(default_factory=list, max_length=64)
    balance_terms: list[Storable] = Field(default_factory=list, max_length=64)
    ops: dict[Storable, Storable] = Field(default_factory=dict, description="Which implementation runs each kernel operation.")
    versions: dict[Storable, Storable] = Field(default_factory=dict)


class MetricsDeclared(_Event):
    """The names of the scalars in the StepDones that follow, in order; replaces an earlier list."""

    event: Literal["metrics_declared"] = "metrics_declared"
    names: list[Annotated[Storable, Field(max_length=200)]] = Field(max_length=500)


class EvalDone(_Event):
    """A validation has been made after `step`."""

    event: Literal["eval_done"] = "eval_done"
    step: Step
    at: Time
    loss: float = Field(description="Mean cross-entropy in nats per token, over all domains.")
    by_domain: dict[Storable, float] = Field(default_factory=dict)
    max_vio_global: float | None = Field(None, description="MaxVio over the validation set, mean over MoE layers (Wang 2024).")
    bits_per_byte: float | None = Field(None, description="The loss in bits per byte of text, which does not depend on the tokenizer.")
    batch_dependence: float | None = Field(
        None,
        description="|a - b| / |b|: a sequence's logits alone (a) and among others (b); 0, to rounding, where no token depends on another sequence.",
    )


class SpikeDetected(_Event):
    """The loss of `step` lies far above its recent past; with what the router did then."""

    event: Literal["spike_detected"] = "spike_detected"
    step: Step
    at: Time
    loss: float
    median: float
    deviation: float = Field(description="1.4826 x median absolute deviation of the window.")
    score: float = Field(description="(loss - median) / deviation")
    router: list[dict[Storable, float]] = Field(
        default_factory=list,
        max_length=10_000,
        description="Per MoE layer: layer, max_vio, max_vio_before, dead, top_expert, top_share, entropy.",
    )


class CheckpointSaved(_Event):
    """A checkpoint is complete on disk and its manifest has been written."""

    event: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: Step
    at: Time
    path: Storable
    size_bytes: Size
    sha256: Storable = Field(description="Of the manifest, which holds every file's own.")
    seconds: float = Field(ge=0)


class RunEnded(_Event):
    """The attempt is over. Written by the supervisor after the last rank is gone."""

    event: Literal["run_ended"] = "run_ended"
    at: Time
    outcome: Literal["succeeded", "failed", "cancelled", "paused"]
    reason: Storable = ""
    detail: Storable = ""
    exit_code: int | None = Field(None, ge=-(2**31), lt=2**31)
    signal: int | None = Field(None, ge=0, le=255)
    log_tail: Storable = ""


@dataclass(frozen=True)
class StepDone:
    """One optimiser step. `scalars` is float32[S] (NaN where unknown); `tensors` maps names of TENSORS to arrays."""

    step: int
    at: float
    scalars: Array
    tensors: Mapping[str, Array] = field(default_factory=dict)
    event: ClassVar[str] = "step_done"


@dataclass(frozen=True)
class SpecialisationCounted:
    """What each expert took of a validation's text (OLMoE, eq. 7), after `step`.

    `class_tokens` uint32[layer, expert, class] and `domain_tokens` uint32[layer, expert, domain] count the tokens that each expert ran on;
    `classes` and `domains` name the last axes and say how many tokens there were of each.
    """

    step: int
    at: float
    classes: Mapping[str, int]
    domains: Mapping[str, int]
    class_tokens: Array
    domain_tokens: Array
    event: ClassVar[str] = "specialisation_counted"


class _SpecialisationHeader(_Event):
    event: Literal["specialisation_counted"]
    step: Step
    at: Time
    classes: dict[Annotated[Storable, Field(max_length=200)], Size] = Field(min_length=1, max_length=100)
    domains: dict[Annotated[Storable, Field(max_length=16_000)], Size] = Field(min_length=1, max_length=1000)


_Closed = RunStarted | MetricsDeclared | EvalDone | SpikeDetected | CheckpointSaved | RunEnded
Event = _Closed | StepDone | SpecialisationCounted
_CLOSED: TypeAdapter[_Closed] = TypeAdapter(Annotated[_Closed, Field(discriminator="event")])


def encode(event: Event) -> bytes:
    """The event as bytes for a spool record or a socket frame."""
    if isinstance(event, StepDone):
        header = {"event": event.event, "step": event.step, "at": event.at}
        return block.encode(header, {"scalars": event.scalars, **event.tensors})
    if isinstance(event, SpecialisationCounted):
        header = {"event": event.event, "step": event.step, "at": event.at, "classes": dict(event.classes), "domains": dict(event.domains)}
        return block.encode(header, {"class_tokens": event.class_tokens, "domain_tokens": event.domain_tokens})
    return block.encode(event.model_dump(), {})


def decode(data: bytes | memoryview) -> Event:
    """The event in `data`; arrays are views into it. Raises EventError for anything that is not one."""
    try:
        header, arrays = block.decode(data)
        if header.get("event") == StepDone.event:
            return _step_done(header, arrays)
        if header.get("event") == SpecialisationCounted.event:
            return _specialisation(header, arrays)
        return _CLOSED.validate_python(header)
    except KeyError as error:
        raise EventError(f"incomplete event: {error} is missing") from error
    except (block.BlockError, ValidationError) as error:
        raise EventError(str(error)) from error


def _step_done(header: dict[str, Any], arrays: dict[str, Array]) -> StepDone:
    step, at = header["step"], header["at"]
    if type(step) is not int or not 0 <= step < 2**31 or type(at) not in (int, float) or not 0 <= at < 1e11:
        raise EventError(f"step_done: bad step {step!r} or time {at!r}")
    scalars = arrays.pop("scalars")
    if scalars.ndim != 1 or scalars.dtype != np.float32 or len(scalars) > 500:
        raise EventError(f"step {step}: scalars must be float32[S] with S <= 500")
    for name, array in arrays.items():
        kind = TENSORS.get(name)
        if kind is None or array.ndim != len(kind.axes) or array.dtype.name != kind.dtype:
            raise EventError(f"step {step}: tensor {name} is unknown, or not {kind and kind.dtype}{kind and list(kind.axes)}")
    return StepDone(step=step, at=float(at), scalars=scalars, tensors=arrays)


def _specialisation(header: dict[str, Any], arrays: dict[str, Array]) -> SpecialisationCounted:
    told = _SpecialisationHeader.model_validate(header)
    by_class, by_domain = arrays["class_tokens"], arrays["domain_tokens"]
    for name, array, last in (("class_tokens", by_class, len(told.classes)), ("domain_tokens", by_domain, len(told.domains))):
        if array.dtype != np.uint32 or array.ndim != 3 or not array.size or array.shape[2] != last or array.shape[:2] != by_class.shape[:2]:
            raise EventError(f"step {told.step}: {name} must be uint32[layer, expert, {last}] with a layer and an expert at least")
    return SpecialisationCounted(told.step, told.at, told.classes, told.domains, by_class, by_domain)
