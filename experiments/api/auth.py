"""How a request says who sends it: a bearer token, or the browser's session with its CSRF token."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import User
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework import authentication, exceptions
from rest_framework.request import Request

from experiments import access


class BearerAuthentication(authentication.BaseAuthentication):
    """`Authorization: Bearer mlk_…`; `request.auth` becomes the Principal."""

    def authenticate(self, request: Request) -> tuple[User, access.Principal] | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        kind, _, bearer = header.strip().partition(" ")
        principal = access.authenticate_token(bearer.strip()) if kind.lower() == "bearer" else None
        if principal is None:
            raise exceptions.AuthenticationFailed("The token is unknown, has expired or was revoked")
        return principal.user, principal

    def authenticate_header(self, request: Request) -> str:
        return 'Bearer realm="moelab"'


class SessionAuthentication(authentication.SessionAuthentication):
    """The session cookie; every method but GET and HEAD needs X-CSRFToken."""

    def authenticate(self, request: Request) -> tuple[User, access.Principal] | None:
        found = super().authenticate(request)
        principal = access.of_user(found[0]) if found else None
        return (principal.user, principal) if principal else None


class _Bearer(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = BearerAuthentication
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer", "description": "A token from POST /api/v1/tokens or the Tokens page."}


class _Session(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = SessionAuthentication
    name = "session"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "apiKey", "in": "cookie", "name": "sessionid", "description": "A browser's session; unsafe methods also need X-CSRFToken."}
