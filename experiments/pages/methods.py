"""The registry of methods, with a link that opens the form with each."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal
from experiments.pages.gate import page
from spec.methods import GROUPS, methods
from spec.methods.page import TITLES


@page
def listing(request: HttpRequest, principal: Principal) -> HttpResponse:
    """All of them, group by group."""
    groups = [(TITLES[group], [entry for entry in methods() if entry.group == group]) for group in GROUPS]
    return render(request, "pages/methods.html", {"groups": groups})
