"""Signing in with a password or with the link that `moelab up` prints, and signing out."""

from __future__ import annotations

from django.contrib import auth
from django.contrib.auth.forms import AuthenticationForm
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from experiments.actions import ticket as tickets
from experiments.actions.sign_in import seconds_to_wait


@never_cache
@sensitive_post_parameters("password")
@require_http_methods(["GET", "HEAD", "POST"])
def login(request: HttpRequest) -> HttpResponse:
    """The form, and what becomes of it. Too many tries for one account answer 429, whether or not there is such an account."""
    if request.method != "POST":
        if request.user.is_authenticated:
            return HttpResponseRedirect(_next(request))
        return render(request, "pages/sign_in.html", {"form": AuthenticationForm(request), "next": _next(request)})
    form = AuthenticationForm(request, request.POST)
    wait_s = seconds_to_wait(request.POST.get("username", ""))
    if wait_s:
        form = AuthenticationForm(request, initial={"username": request.POST.get("username", "")})
        context = {"form": form, "next": _next(request), "wait_s": wait_s}
        answer = render(request, "pages/sign_in.html", context, status=429)
        answer.headers["Retry-After"] = str(wait_s)
        return answer
    if not form.is_valid():
        return render(request, "pages/sign_in.html", {"form": form, "next": _next(request)}, status=403)
    auth.login(request, form.get_user())
    return HttpResponseRedirect(_next(request))


@never_cache
@require_GET
def ticket(request: HttpRequest, ticket: str) -> HttpResponse:
    """Signs in whom the ticket is for, once."""
    user = tickets.redeem(ticket)
    if user is None:
        if request.user.is_authenticated:
            return HttpResponseRedirect(_next(request))
        title, text = (
            "This link has been used or is too old",
            "It signs in once, within ten minutes. Start moelab again for a new one, or sign in with the password.",
        )
        return render(request, "pages/error.html", {"title": title, "text": text}, status=410)
    auth.login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return HttpResponseRedirect(_next(request))


@never_cache
@require_POST
def logout(request: HttpRequest) -> HttpResponse:
    """Ends the session."""
    auth.logout(request)
    return HttpResponseRedirect(reverse("login"))


def _next(request: HttpRequest) -> str:
    """Where to go afterwards: the page that was asked for if it is one of ours."""
    target = request.POST.get("next") or request.GET.get("next") or ""
    ours = url_has_allowed_host_and_scheme(target, allowed_hosts={request.get_host()}, require_https=request.is_secure())
    return target if ours else reverse("runs")
