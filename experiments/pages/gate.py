"""The door of every page: `experiments.access` decides, and the answer is a page, a sign-in, or an error page."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate
from urllib.parse import quote

from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.urls import reverse

from experiments.access import Principal, Verdict, decide, of_user

View = Callable[Concatenate[HttpRequest, Principal, ...], HttpResponse]


def page(view: View) -> Callable[..., HttpResponse]:
    """`view`, called with the principal, for those whom the table of routes lets in."""

    @wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        principal = of_user(request.user)
        route = request.resolver_match.route if request.resolver_match else ""
        verdict = decide(principal, route, request.method or "GET", kwargs)
        if verdict is Verdict.SIGN_IN or principal is None:
            return _to_sign_in(request)
        if verdict is Verdict.FORBID:
            raise PermissionDenied
        if verdict is Verdict.NO_METHOD:
            return HttpResponseNotAllowed(["GET"])
        if verdict is not Verdict.ALLOW:
            raise Http404
        return view(request, principal, *args, **kwargs)

    return guarded


def _to_sign_in(request: HttpRequest) -> HttpResponse:
    target = f"{reverse('login')}?next={quote(request.get_full_path())}"
    if request.headers.get("HX-Request"):
        # A part of a page cannot show the sign-in: the whole page goes there.
        return HttpResponse(status=401, headers={"HX-Redirect": target})
    return HttpResponseRedirect(target)
