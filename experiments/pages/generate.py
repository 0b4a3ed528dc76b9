"""Text from a run's checkpoint: the form, and the text with its experts, which the browser draws."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal, roles_include
from experiments.actions.generate import MAX_PROMPT, MAX_TOKENS
from experiments.api.generations import summary
from experiments.api.resources import run_json
from experiments.models import Role
from experiments.pages.gate import page
from experiments.pages.run import run_of

SHOWN = 20


@page
def generate(request: HttpRequest, principal: Principal, run_id: int) -> HttpResponse:
    """The page; `?id=` opens an earlier generation."""
    run = run_of(principal, run_id)
    rows = run.generations.defer("result").select_related("creator", "worker").order_by("-id")
    given = request.GET.get("id", "")
    chosen = rows.filter(pk=int(given)).first() if given.isascii() and given.isdigit() and len(given) < 19 else None
    shown = run_json(run)
    steps = run.checkpoints.filter(deleted=False).order_by("-step").values_list("step", flat=True).distinct()
    context = {
        "run": shown,
        "page_data": {"run": shown, "chosen": summary(chosen) if chosen else None},
        "chosen": chosen,
        "parameters": {"tokens": 64, "temperature": 0.8, "top_p": 1.0, "top_k": 0, "seed": 0, **(chosen.parameters if chosen else {})},
        "steps": list(steps),
        "generations": list(rows[:SHOWN]),
        "may_edit": roles_include(principal, run.project_id, Role.EDITOR),
        "max_prompt": MAX_PROMPT,
        "max_tokens": MAX_TOKENS,
    }
    return render(request, "pages/generate.html", context)
