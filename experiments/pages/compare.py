"""Several runs over one another, and where their specs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal, visible_runs
from experiments.api.resources import hosts, run_json
from experiments.models import Run
from experiments.pages.gate import page

MAX_RUNS = 12


@page
def compare(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The page of `?id=1&id=2`, in that order; runs that the reader may not see are left out."""
    ids = [int(given) for given in request.GET.getlist("id") if given.isascii() and given.isdigit() and len(given) < 19][:MAX_RUNS]
    found = visible_runs(principal).select_related("project", "owner", "worker").prefetch_related(hosts()).in_bulk(ids)
    runs = [found[pk] for pk in dict.fromkeys(ids) if pk in found]
    return render(request, "pages/compare.html", {"runs": [run_json(run) for run in runs], "differences": _differences(runs)})


def _differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(dotted path, the value in each run) wherever the runs do not agree."""
    flat = [dict(_leaves(run.spec, "")) for run in runs]
    paths = dict.fromkeys(path for one in flat for path in one)
    rows = [(path, [_text(one.get(path)) for one in flat]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
        return
    for key, child in pairs:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _text(value: Any) -> str:
    return "–" if value is None else json.dumps(value, ensure_ascii=False)
