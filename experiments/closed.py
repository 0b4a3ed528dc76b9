"""The last door: a page whose view forgot to ask is still closed. (Pages ask by themselves, the API through its permission.)"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.http.response import HttpResponseBase
from django.urls import reverse
from django.utils.http import urlencode

from experiments.access import of_user
from experiments.routes import OPEN, ROUTES

API = "api/v1/"


class ClosedByDefault:
    """Middleware: a route without a row in `experiments.routes` does not exist, and a page that is not open asks who you are."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        return self.get_response(request)

    def process_view(self, request: HttpRequest, view: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> HttpResponse | None:
        """None where the view may be asked; raises Http404 for a route that the table does not know."""
        route = request.resolver_match.route if request.resolver_match else ""
        if route in OPEN or route.startswith(API):
            return None
        if route not in ROUTES:
            raise Http404
        if of_user(request.user) is None and request.method == "GET" and not request.headers.get("HX-Request"):
            return HttpResponseRedirect(f"{reverse('login')}?{urlencode({'next': request.get_full_path()})}")
        return None
