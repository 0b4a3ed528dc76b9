"""The page for a mistake of our own: it asks neither database nor session, either of which may be what broke."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, HttpResponseServerError
from django.template import loader


def broken(request: HttpRequest) -> HttpResponse:
    """500, in the theme that the reader has chosen."""
    return HttpResponseServerError(loader.render_to_string("500.html", {"request": request}))
