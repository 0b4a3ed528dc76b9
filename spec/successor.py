"""What one does with a model that has been trained: the spec of a run that goes on from its weights."""

from __future__ import annotations

from typing import Literal

from spec.experiment import ExperimentSpec
from spec.moe import Moe
from spec.start import FromCheckpoint, Upcycle


def fine_tuning(spec: ExperimentSpec, run: int, step: int | None = None) -> ExperimentSpec:
    """The same experiment with the weights of run `run` as its start."""
    return ExperimentSpec.model_validate(
        spec.model_dump(mode="json") | {"name": _name(spec, "fine-tuned"), "start": FromCheckpoint(run=run, step=step).model_dump()}
    )


def upcycling(spec: ExperimentSpec, run: int, step: int | None = None, *, method: Literal["copy", "granular"] = "copy") -> ExperimentSpec:
    """Eight copies of the feed-forward layers of the dense run `run`, two for each token; granular: each copy in two slices, if its width is even.

    Raises ValueError for a spec that has MoE layers already.
    """
    if spec.model.moe is not None:
        raise ValueError("model.moe: the spec has MoE layers already; upcycling begins with a dense model")
    slices = 2 if method == "granular" and spec.model.d_ff % 2 == 0 else 1
    moe = Moe(n_experts=8 * slices, top_k=2 * slices, d_expert=spec.model.d_ff // slices)
    start = Upcycle(run=run, step=step, method="granular" if slices > 1 else "copy", granularity=slices)
    plain = spec.model_dump(mode="json")
    plain["model"] |= {"moe": moe.model_dump(mode="json")}
    return ExperimentSpec.model_validate(plain | {"name": _name(spec, "upcycled"), "start": start.model_dump()})


def _name(spec: ExperimentSpec, what: str) -> str:
    return f"{spec.name[:180]}, {what}"
