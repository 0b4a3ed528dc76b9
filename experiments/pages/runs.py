"""The list of runs: filters in the address, a page at a time, rows that htmx can ask for alone."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, QueryDict
from django.shortcuts import render
from django.urls import reverse
from pydantic import ValidationError

from experiments.access import Principal, visible_runs
from experiments.api.problems import Problem
from experiments.api.resources import hosts, run_json
from experiments.api.runs_query import RunsQuery
from experiments.models import Run, State
from experiments.pages.gate import page
from experiments.telemetry.sparkline import sparklines

ORDERS = (
    ("-created_at", "Newest first"),
    ("created_at", "Oldest first"),
    ("name", "By name"),
    ("loss", "Lowest loss first"),
    ("-loss", "Highest loss first"),
)
_SINGLE = ("q", "order", "cursor", "project")
_LISTED = ("state", "tag", "metric")


@page
def home(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The front door leads to the runs."""
    return HttpResponseRedirect(reverse("runs"))


@page
def listing(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The table of runs."""
    context: dict[str, Any] = {
        "states": State.values,
        "orders": ORDERS,
        "filters": request.GET.dict(),
        "runs": [],
        "origin": request.build_absolute_uri("/")[:-1],
    }
    context["filtered"] = any(request.GET.get(name) for name in ("q", "state", "tag", "metric", "starred", "archived", "project"))
    try:
        query = _query(request.GET)
        related = query.apply(visible_runs(principal)).select_related("project", "owner", "worker").prefetch_related(hosts())
        found = list(related[: query.limit + 1])
    except ValidationError as error:
        context["error"] = "; ".join(f"{item['loc'][0]} {item['msg'].removeprefix('Value error, ')}" for item in error.errors())
        return render(request, "pages/runs.html", context, status=400 if not request.headers.get("HX-Request") else 200)
    except Problem as problem:
        context["error"] = str(problem)
        return render(request, "pages/runs.html", context)
    shown = found[: query.limit]
    context["first"] = not found and not context["filtered"] and not visible_runs(principal).exists()
    context["runs"] = _rows(shown)
    if len(found) > query.limit:
        after = request.GET.copy()
        after["cursor"] = query.cursor_after(shown[-1])
        context["next_query"] = after.urlencode()
    return render(request, "pages/runs.html", context)


@page
def row(request: HttpRequest, principal: Principal, run_id: int) -> HttpResponse:
    """One row of the table, as it is now."""
    run = visible_runs(principal).select_related("project", "owner", "worker").filter(pk=run_id).first()
    if run is None:
        raise Http404
    return render(request, "pages/_run_row.html", {"run": _rows([run])[0]})


def _rows(runs: list[Run]) -> list[dict[str, Any]]:
    lines = sparklines([run.pk for run in runs])
    return [run_json(run, sparkline=lines.get(run.pk, [])) for run in runs]


def _query(given: QueryDict) -> RunsQuery:
    """The API's own query, from a form that also sends fields left empty. Raises ValidationError."""
    values: dict[str, Any] = {name: given[name] for name in _SINGLE if given.get(name)}
    values |= {name: [value for value in given.getlist(name) if value] for name in _LISTED}
    values |= {name: True for name in ("starred", "archived") if given.get(name)}
    return RunsQuery.model_validate(values)
