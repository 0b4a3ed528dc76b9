"""The form of a new run, from the defaults, a preset (`?preset=`), or another run (`?from=`)."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal, visible_projects, visible_runs
from experiments.models import Role, Run
from experiments.pages.form import sections, spec_form
from experiments.pages.gate import page
from experiments.pages.preset import groups
from spec import presets
from spec.experiment import ExperimentSpec

OPEN_SECTIONS = ("model.moe", "model", "training")


@page
def new(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The form."""
    parent, name = _parent(request, principal), request.GET.get("preset", "")
    context = {
        "form": spec_form(),
        "sections": sections(),
        "open_sections": OPEN_SECTIONS,
        "prefix": "",
        "initial": _initial(parent, name),
        "parent": parent,
        "preset_name": name,
        "preset_groups": groups(),
        "projects": visible_projects(principal, Role.EDITOR).order_by("name"),
    }
    return render(request, "pages/new.html", context)


def _parent(request: HttpRequest, principal: Principal) -> Run | None:
    given = request.GET.get("from", "")
    if not given:
        return None
    run = visible_runs(principal).filter(pk=int(given)).first() if given.isascii() and given.isdigit() and len(given) < 19 else None
    if run is None or not run.spec:
        raise Http404
    return run


def _initial(parent: Run | None, name: str) -> dict[str, Any]:
    if parent is not None:
        stored: dict[str, Any] = parent.spec
        return stored
    try:
        spec = presets.load(name) if name else ExperimentSpec()
    except presets.UnknownPresetError as error:
        raise Http404 from error
    plain: dict[str, Any] = spec.model_dump(mode="json")
    return plain
