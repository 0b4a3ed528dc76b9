"""The tab that shows where experts would lie if they were placed by their load: who holds what in one layer, and how even all layers would be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from django.http import HttpRequest

from experiments.models import Run
from experiments.telemetry import placement
from experiments.telemetry.placement import Asked, PlacementError

MAX_DEVICES = 512
"""Rows of the table of devices; REST has all."""
_LIMITS = {"devices": 4096, "replicas": 65_536, "nodes": 4096, "groups": 65_536, "from": 2**31 - 1, "to": 2**31 - 1}


def context(request: HttpRequest, run: Run) -> dict[str, Any]:
    """What the template shows: the placement that the query asks for, or the reason why there is none."""
    numbers = {name: _number(request, name, limit) for name, limit in _LIMITS.items()}
    own = placement.usual(run)
    devices = numbers["devices"] or own.devices
    replicas = numbers["replicas"] or -(-max(run.n_experts, 1) // devices) * devices
    asked = replace(own, devices=devices, replicas=replicas, nodes=numbers["nodes"] or 1, groups=numbers["groups"] or own.groups)
    shown: dict[str, Any] = {"run": run, "asked": asked, "numbers": numbers}
    try:
        measured = placement.loads(run, numbers["from"], numbers["to"])
        return shown | ({} if measured is None else _placed(request, run, measured, asked))
    except PlacementError as error:
        return shown | {"wrong": str(error)}


def _placed(request: HttpRequest, run: Run, measured: placement.Loads, asked: Asked) -> dict[str, Any]:
    made = placement.placed(measured, asked)
    before, after = made.balance
    names = [*run.moe_layers, *range(len(run.moe_layers), len(after))]
    row = min(_number(request, "layer", 100_000) or 0, len(after) - 1)
    copies = made.placement.copies_LE[row]
    load_before = None if made.load_before is None else made.load_before[row]
    return {
        "made": made,
        "row": row,
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
            for device in range(min(asked.devices, MAX_DEVICES))
        ],
        "left_out": max(asked.devices - MAX_DEVICES, 0),
    }


def _number(request: HttpRequest, name: str, limit: int) -> int | None:
    """The query's number where it is one of 0 … limit."""
    asked = request.GET.get(name, "")
    number = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 11 else None
    return number if number is not None and number <= limit else None
