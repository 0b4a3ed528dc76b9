"""Where a run's first weights come from, as a person describes it: drawn anew, or those of a model that exists already."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spec.part import Part, field
from spec.text import Text

_RUN = "A run of this server, whose weights lie on the worker that made it."
_STEP = "Which of its checkpoints; empty means the newest."
_PATH = "On the worker: a run's directory, its checkpoints directory, or one checkpoint (step-…)."
_HUGGING_FACE = "On the worker: a directory with config.json and safetensors, as Hugging Face's save_pretrained writes it."


class Scratch(Part):
    """Weights drawn from the seed."""

    kind: Literal["scratch"] = "scratch"


class FromCheckpoint(Part):
    """Weights of a checkpoint of the same model, with a fresh optimiser: fine-tuning. Only at the first start: a resumed run has its own."""

    kind: Literal["checkpoint"] = "checkpoint"
    run: int | None = field(None, f"{_RUN} Either this or path.", ge=1, le=2**31 - 1)
    path: Text | None = Field(None, description=f"{_PATH} Either this or run.")
    step: int | None = field(None, _STEP, ge=0, le=2**31 - 1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _named_once(self, "run", "path")
        return self


class FromHuggingFace(Part):
    """Weights of a Hugging Face checkpoint whose config.json describes this model, with a fresh optimiser."""

    kind: Literal["huggingface"] = "huggingface"
    path: Text = Field(description=_HUGGING_FACE, min_length=1)


class Upcycle(Part):
    """A dense model made into this Mixture of Experts: its feed-forward layers become the experts, beside a fresh router (Komatsuzaki 2022)."""

    kind: Literal["upcycle"] = "upcycle"
    run: int | None = field(None, f"{_RUN} One of run, path and huggingface.", ge=1, le=2**31 - 1)
    path: Text | None = Field(None, description=f"{_PATH} One of run, path and huggingface.")
    huggingface: Text | None = Field(None, description=f"{_HUGGING_FACE} One of run, path and huggingface.")
    step: int | None = field(None, _STEP, ge=0, le=2**31 - 1)
    method: Literal["copy", "granular"] = field(
        "copy",
        "copy: each expert is the whole dense layer (Komatsuzaki 2022). granular: each copy is cut into slices of its hidden units, one "
        "expert each; the router begins by choosing whole copies (He 2024, virtual groups).",
    )
    granularity: int = field(1, "Slices of each copy; with method granular at least 2.", ge=1, le=65536, unit="slices")
    expand: int | None = field(None, "Copies of the dense layer; empty means n_experts / granularity.", ge=1, le=65536, unit="copies")
    noise_std: float = field(
        0.0, "Noise on the experts' weights, so that copies differ: its standard deviation as a share of the matrix's own.", ge=0, le=10
    )
    noise_share: float = field(1.0, "Share of each expert's hidden units that the noise reaches.", gt=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _named_once(self, "run", "path", "huggingface")
        if self.huggingface is not None and self.step is not None:
            raise ValueError("step is for checkpoints of runs; huggingface has none")
        if (self.method == "granular") != (self.granularity > 1):
            raise ValueError(f"granularity {self.granularity} with method {self.method}: copy takes 1, granular at least 2")
        return self


def _named_once(part: Part, *names: str) -> None:
    given = [name for name in names if getattr(part, name) is not None]
    if not given:
        raise ValueError(f"{' or '.join(names)} must say where the weights are")
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given; only one of them can say where the weights are")
    if getattr(part, given[0]) == "":
        raise ValueError(f"{given[0]} is empty")


Start = Annotated[Scratch | FromCheckpoint | FromHuggingFace | Upcycle, Field(discriminator="kind")]
