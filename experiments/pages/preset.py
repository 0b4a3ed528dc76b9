"""Presets with their price beside the published figures."""

from __future__ import annotations

from functools import cache
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal
from experiments.pages.gate import page
from spec import presets
from spec.accounting import price
from spec.yaml_text import dump

CONVENTIONS = {
    "with_embeddings": "with both embeddings",
    "without_input_embedding": "without the input embedding",
    "without_embeddings": "without embeddings",
}
TITLES = {"nano": "Small: train in a minute or two on two cores", "full": "Published, at full size"}


@page
def listing(request: HttpRequest, principal: Principal) -> HttpResponse:
    """All of them."""
    return render(request, "pages/presets.html", {"groups": groups()})


@page
def detail(request: HttpRequest, principal: Principal, name: str) -> HttpResponse:
    """One preset: spec, price by part, source."""
    try:
        preset, spec = presets.describe(name), presets.load(name)
    except presets.UnknownPresetError as error:
        raise Http404 from error
    cost = price(spec)
    parts = [(part, total, cost.active_by_part[part]) for part, total in cost.by_part.items() if total]
    convention = CONVENTIONS.get((preset.published and preset.published.active_convention) or "", "")
    figures = {"price": cost, "parts": parts, "tokens": spec.data.seq_len, "convention": convention}
    return render(request, "pages/preset.html", {"preset": preset, "yaml": dump(spec), **figures})


@cache
def groups() -> list[dict[str, Any]]:
    """The presets by size, each with its figures; they come with the program and never change while it runs."""
    rows = [_row(name) for name in presets.names()]
    return [{"title": title, "published": size == "full", "presets": [row for row in rows if row["size"] == size]} for size, title in TITLES.items()]


def _row(name: str) -> dict[str, Any]:
    preset, spec = presets.describe(name), presets.load(name)
    cost, moe = price(spec), spec.model.moe
    convention = preset.published.active_convention if preset.published else None
    return {
        "name": name,
        "title": preset.title,
        "size": preset.size,
        "about": preset.about,
        "published": preset.published,
        "total": cost.total_params,
        "active": getattr(cost.active_params, convention or "with_embeddings"),
        "experts": f"{moe.top_k} of {moe.n_experts}" + (f" + {moe.n_shared}" if moe.n_shared else "") if moe else "dense",
        "moe_layers": f"{len(spec.model.moe_layers())} of {spec.model.n_layers}",
    }
