"""The dense model to compare a Mixture of Experts with: every layer dense, as wide as costs the same."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from spec.accounting import Price, price
from spec.experiment import ExperimentSpec
from spec.problems import Problem, from_validation_error

Equal = Literal["flops", "params"]
MOST = 1_048_576  # the limit of model.d_ff


class NoBaselineError(ValueError):
    """The spec has no dense baseline. `problems` say why, each at its field."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def dense_baseline(spec: ExperimentSpec, equal: Equal = "flops") -> ExperimentSpec:
    """`spec` without experts and from scratch, with the model.d_ff whose cost is closest; of two that are equally close the smaller.

    The cost is forward FLOPs per token ("flops") or active parameters ("params"). Data, optimiser, training and the number of devices stay.
    Raises NoBaselineError for a spec that is dense already, and where no width is enough.
    """
    if spec.model.moe is None:
        raise NoBaselineError([Problem("/model/moe", "moe: null, the spec is dense already")])
    try:
        return _closest(_dense(spec), cost(price(spec), equal), equal)
    except ValidationError as error:
        raise NoBaselineError(from_validation_error(error)) from error


def _closest(plain: dict[str, Any], wanted: int, equal: Equal) -> ExperimentSpec:
    def at(width: int) -> int:
        return cost(price(_of_width(plain, width)), equal)

    low, high = 1, MOST
    while low < high:  # the narrowest that costs no less
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle) >= wanted else (middle + 1, high)
    if at(low) < wanted:
        raise NoBaselineError([Problem("/model/d_ff", f"d_ff: a dense model as costly as this one would be wider than {MOST:,}")])
    if low > 1 and wanted - at(low - 1) <= at(low) - wanted:
        low -= 1
    return _of_width(plain, low)


def cost(figures: Price, equal: Equal) -> int:
    """What is to be equal: forward FLOPs per token, or active parameters."""
    return figures.flops_per_token.forward if equal == "flops" else figures.active_params.with_embeddings


def _dense(spec: ExperimentSpec) -> dict[str, Any]:
    """The baseline as plain data, but for its width."""
    plain = spec.model_dump(mode="json", exclude={"start"})
    plain["name"] = f"{spec.name[:180]}, dense"
    plain["model"]["moe"] = None
    if plain["model"]["attention"].get("experts") is not None:
        plain["model"]["attention"]["experts"] = None  # a dense model routes nowhere; the width makes up for it
    plain["training"]["train"] = "all"
    plain["parallel"] |= {"expert": 1, "data": spec.parallel.world_size}
    return plain


def _of_width(plain: dict[str, Any], width: int) -> ExperimentSpec:
    return ExperimentSpec.model_validate({**plain, "model": {**plain["model"], "d_ff": width}})
