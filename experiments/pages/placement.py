"""The tab that shows where experts would lie if they were placed by their load: who holds what in one layer, and how even all layers would be."""

from __future__ import annotations

from typing import Any, NamedTuple

from django.http import HttpRequest
from pydantic import Field, ValidationError

from experiments.api.placement import PlacementQuery, made_for
from experiments.api.problems import FieldError, Problem, invalid_query, wrong_parameter
from experiments.models import Run
from experiments.telemetry import placement
from experiments.telemetry.placement import Placed

MAX_DEVICES = 512
"""Rows of the table of devices; REST has all."""
_ABSENT = {"devices": "", "nodes": "1", "replicas": "fewest", "groups": "", "from": f"last {placement.WINDOW_STEPS}", "to": "newest"}


class PanelQuery(PlacementQuery):
    """What REST takes, and the layer whose devices are shown."""

    layer: int = Field(0, ge=0, lt=100_000)


class Number(NamedTuple):
    """A number of the form as it was typed; empty where it is the run's own, which `placeholder` then says."""

    name: str
    value: str
    placeholder: str
    error: str


def context(request: HttpRequest, run: Run) -> dict[str, Any]:
    """What the template shows: the placement that the query asks for, or, beside the number at fault, why there is none."""
    typed = {name: str(value) for name, value in request.GET.items() if value}
    errors: list[FieldError] = []
    shown: dict[str, Any] = {"run": run, "layer_names": list(enumerate(run.moe_layers))}
    made = None
    try:
        query = PanelQuery.model_validate(typed)
        shown["row"] = query.layer
        made = made_for(run, query)
        shown |= {} if made is None else _placed(run, made, query.layer)
    except ValidationError as error:
        errors = invalid_query(error).errors
    except Problem as problem:
        errors = problem.errors
    own = made.asked if made else placement.asked(run, max(run.n_experts, 1), None, None, None, None)
    absent = _ABSENT | {"devices": own.devices, "groups": own.groups} | ({"replicas": own.replicas} if made else {})
    said = {error.parameter: error.detail for error in errors}
    numbers = [Number(name, typed.get(name, ""), str(absent[name]), said.pop(name, "")) for name in _ABSENT]
    return shown | {"numbers": numbers, "typed": typed, "wrong": bool(errors), "others": list(said.values())}


def _placed(run: Run, made: Placed, row: int) -> dict[str, Any]:
    before, after = made.balance
    if row >= len(after):
        raise wrong_parameter("layer", f"layer {row} > {len(after) - 1}, the last row of the run's MoE layers")
    names = [*run.moe_layers, *range(len(run.moe_layers), len(after))]
    copies = made.placement.copies_LE[row]
    load_before = None if made.load_before is None else made.load_before[row]
    return {
        "made": made,
        "layer_name": names[row],
        "layers": [
            {"row": i, "name": names[i], "before": None if before is None else float(before[i]), "after": float(after[i])} for i in range(len(after))
        ],
        "before": None if before is None else float(before.mean()),
        "after": float(after.mean()),
        "most": float(max(made.load_after[row].max(), 0 if load_before is None else load_before.max())),
        "devices": [
            {
                "before": None if load_before is None else float(load_before[device]),
                "after": float(made.load_after[row, device]),
                "experts": [(expert, int(copies[expert])) for expert in made.placement.on_device(row, device)],
            }
            for device in range(min(made.asked.devices, MAX_DEVICES))
        ],
        "left_out": max(made.asked.devices - MAX_DEVICES, 0),
    }
