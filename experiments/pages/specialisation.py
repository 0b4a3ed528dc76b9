"""The tab that shows what experts specialise on: a table of experts by classes of tokens and domains, coloured against chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest

from experiments.models import Run
from experiments.telemetry import specialisation
from experiments.telemetry.specialisation import Group

MAX_CELLS = 20_000
"""Cells of one table; of a layer with more experts than fit, the page shows the first, and REST has all."""
MAX_STEPS = 500
"""Validations that one can choose from: the newest."""
_REACH = 4  # Colours from -4 to 4 in half powers of two: a quarter to four times chance, as in the routing heat map.


@dataclass(frozen=True)
class Cell:
    """An expert's share of a group, how many times chance that is, and the colour: -4 … 4, or `none` for no token at all."""

    share: float
    ratio: float
    heat: str


def context(request: HttpRequest, run: Run) -> dict[str, Any]:
    """What the template shows: the validation and layer that the query asks for, the newest and the first where it asks for none."""
    steps = specialisation.steps(run.pk)[:MAX_STEPS]
    step = _chosen(request, "step", steps)
    rows = list(range(len(run.moe_layers)))
    layer = _chosen(request, "layer", rows)
    found = None if step is None or layer is None else specialisation.layer(run.pk, step, layer)
    if found is None or not run.n_experts:
        return {"run": run, "specialisation": None}
    chance = run.top_k / run.n_experts
    tables = [_table(title, groups, chance) for title, groups in (("Class of token", found.classes), ("Domain", found.domains))]
    return {
        "run": run,
        "specialisation": found,
        "steps": steps,
        "layers": list(zip(rows, run.moe_layers, strict=True)),
        "chance": chance,
        "top_k": run.top_k,
        "n_experts": run.n_experts,
        "tables": [table for table in tables if table["groups"]],
    }


def _chosen(request: HttpRequest, name: str, options: list[int]) -> int | None:
    """The query's choice where it is one of `options`, else the first of them."""
    asked = request.GET.get(name, "")
    number = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 10 else None
    return number if number in options else (options[0] if options else None)


def _table(title: str, groups: list[Group], chance: float) -> dict[str, Any]:
    shares = [group.share for group in groups]
    experts = min(len(shares[0]), max(1, MAX_CELLS // len(shares))) if shares else 0
    rows = [(expert, [_cell(float(share[expert]), chance) for share in shares]) for expert in range(experts)]
    return {"title": title, "groups": groups, "rows": rows, "left_out": len(shares[0]) - experts if shares else 0}


def _cell(share: float, chance: float) -> Cell:
    ratio = share / chance
    heat = "none" if share == 0 else str(max(-_REACH, min(_REACH, round(2 * math.log2(ratio)))))
    return Cell(share, ratio, heat)
