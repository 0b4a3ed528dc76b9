"""The live page of one run: the shell, which the browser fills over REST and WebSocket, and the parts that the server writes."""

from __future__ import annotations

import json
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal, roles_include, visible_runs
from experiments.actions.stored import stored_at
from experiments.api.resources import nodes_of, run_json
from experiments.models import Role, Run
from experiments.pages import placement, specialisation
from experiments.pages.gate import page
from experiments.pages.notices import router_notice
from experiments.pages.traffic import expected_traffic, sample_steps
from experiments.pages.waiting import waits_for
from spec.diff import diff
from spec.events import PARTS
from spec.experiment import ExperimentSpec
from spec.yaml_text import dump

PANELS = ("specialisation", "placement", "timeline", "checkpoints", "spec")


@page
def detail(request: HttpRequest, principal: Principal, run_id: int) -> HttpResponse:
    """The page."""
    run = run_of(principal, run_id)
    shown = run_json(run)
    # A recorded run has no spec: its trainer may tell of experts with its first step.
    dense = not run.n_experts and bool(run.spec) and run.spec.get("model", {}).get("moe") is None
    context = {
        "run": shown,
        "page_data": {
            "run": shown,
            "log_size": run.log_size,
            "parts": {"names": PARTS, "every": sample_steps(run.spec)},
            "expert_ranks": run.spec.get("parallel", {}).get("expert", 1),
            "waits_for": waits_for(run),
            "every": run.spec.get("telemetry", {}).get("every"),
        },
        "first_told": _first_told(run),
        "router_notice": router_notice(run.spec),
        "traffic": expected_traffic(run.spec),
        "dense": dense,
        "panels": [name for name in PANELS if not (dense and name in ("specialisation", "placement"))],
        "may_edit": roles_include(principal, run.project_id, Role.EDITOR),
        "may_delete": roles_include(principal, run.project_id, Role.ADMIN),
    }
    return render(request, "pages/run.html", context)


def _first_told(run: Run) -> str:
    """When the page's pictures can begin, in words."""
    every = run.spec.get("telemetry", {}).get("every", 1)
    return "with the first step" if every == 1 else f"at step {min(every, run.steps):,}: this run tells every {every:,} steps (telemetry.every)"


@page
def panel(request: HttpRequest, principal: Principal, run_id: int, panel: str) -> HttpResponse:
    """A tab of the page, fetched when it is opened; `waiting` is what a queued run waits for, as plain text."""
    run = run_of(principal, run_id)
    if panel == "waiting":
        return HttpResponse(waits_for(run), content_type="text/plain; charset=utf-8")
    if panel == "timeline":
        return render(request, "pages/_timeline.html", {"transitions": run.transitions.order_by("-id"), "nodes": nodes_of(run), "run": run})
    if panel == "checkpoints":
        rows = run.checkpoints.select_related("run").order_by("-step", "-attempt")
        return render(request, "pages/_checkpoints.html", {"checkpoints": [(row, stored_at(row)) for row in rows]})
    if panel == "specialisation":
        return render(request, "pages/_specialisation.html", specialisation.context(request, run))
    if panel == "placement":
        return render(request, "pages/_placement.html", placement.context(request, run))
    if panel == "spec":
        return render(request, "pages/_spec.html", _spec_context(principal, run))
    raise Http404


def spec_yaml(plain: dict[str, Any]) -> str:
    """A stored spec as YAML; as JSON where it is of an older version of the language."""
    try:
        return dump(ExperimentSpec.model_validate(plain))
    except ValueError:
        return json.dumps(plain, indent=2)


def _spec_context(principal: Principal, run: Run) -> dict[str, Any]:
    parent = visible_runs(principal).filter(pk=run.parent_id).first() if run.parent_id else None
    changed = [(path, json.dumps(there), json.dumps(here)) for path, there, here in diff(parent.spec, run.spec)] if parent else []
    return {
        "run": run_json(run),
        "yaml": spec_yaml(run.spec) if run.spec else "# reported by an outside trainer: moelab has no spec of it",
        "parent": parent,
        "diff": changed,
        "tokens_per_step": run.tokens_per_step,
        "ops": run.ops,
        "versions": run.versions,
        "device_names": run.device_names,
    }


def run_of(principal: Principal, run_id: int) -> Run:
    """The run, if it exists for this reader. Raises Http404."""
    run = visible_runs(principal).select_related("project", "owner", "worker").filter(pk=run_id).first()
    if run is None:
        raise Http404
    return run
