"""The form of a new run, from the defaults, a preset (`?preset=`), a method (`?method=`), or another run (`?from=`, `&as=`)."""

from __future__ import annotations

from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal, roles_include, visible_projects, visible_runs
from experiments.models import Role, Run
from experiments.pages import successor
from experiments.pages.form import sections, spec_form
from experiments.pages.gate import page
from experiments.pages.preset import groups
from spec import presets
from spec.experiment import ExperimentSpec
from spec.methods import UnknownMethodError, method

OPEN_SECTIONS = ("model.moe", "model", "training")


@page
def new(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The form."""
    parent, name = _parent(request, principal), request.GET.get("preset", "")
    made = successor.wanted(request.GET.get("as", ""), parent)
    chosen = request.GET.get("method", "")
    initial = _initial(parent, name, chosen, made)
    begun = initial.get("start", {}).get("kind", "scratch") != "scratch"
    clones = parent is not None and roles_include(principal, parent.project_id, Role.EDITOR)  # a viewer submits it elsewhere
    context = {
        "form": spec_form(),
        "sections": sections(),
        "open_sections": (*OPEN_SECTIONS, "start") if begun else OPEN_SECTIONS,
        "prefix": "",
        "initial": initial,
        "defaults": ExperimentSpec().model_dump(mode="json"),
        "parent": parent,
        "clones": clones,
        "parent_title": made.title,
        "compared_with": successor.compared_with(parent, made),
        "preset_name": name,
        "method": chosen and not name,
        "preset_groups": groups(),
        "projects": [parent.project] if parent and clones else visible_projects(principal, Role.EDITOR).order_by("name"),
    }
    return render(request, "pages/new.html", context)


def _parent(request: HttpRequest, principal: Principal) -> Run | None:
    given = request.GET.get("from", "")
    if not given:
        return None
    runs = visible_runs(principal).select_related("project")
    run = runs.filter(pk=int(given)).first() if given.isascii() and given.isdigit() and len(given) < 19 else None
    if run is None or not run.spec:
        raise Http404
    return run


def _initial(parent: Run | None, name: str, key: str, made: successor.Successor) -> dict[str, Any]:
    if parent is not None:
        return successor.initial(parent, made)
    try:
        spec = presets.load(name) if name else method(key).experiment() if key else ExperimentSpec()
    except (presets.UnknownPresetError, UnknownMethodError) as error:
        raise Http404 from error
    plain: dict[str, Any] = spec.model_dump(mode="json")
    return plain
