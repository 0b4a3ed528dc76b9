"""HTTP with moelab's manners: a bearer token, problem+json as exceptions, and a second try where that is safe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from moelab.connection import Connection, find_server

_RETRY_AFTER_S = (0.1, 0.4, 1.0)
_SAFE = frozenset({"GET", "HEAD", "PUT", "DELETE"})


class ServerUnreachable(ConnectionError):  # noqa: N818  says what is so, like ConnectionRefused
    """No answer from the server: it is down, elsewhere, or too slow."""


class ApiError(Exception):
    """The server refused. `errors` lists what is at fault: {pointer | parameter | header, detail}; each is said once, on a line of its own."""

    def __init__(self, status: int, title: str, detail: str = "", errors: list[dict[str, str]] | None = None) -> None:
        self.status, self.title, self.detail, self.errors = status, title, detail, errors or []
        told = [error.get("detail", "") for error in self.errors]
        lines = [f"\n  {error['pointer']}: {text}" if error.get("pointer") else f"\n  {text}" for error, text in zip(self.errors, told, strict=True)]
        more = f": {detail}" if detail and detail != "; ".join(told[:3]) else ""
        super().__init__(f"{title or 'refused'} ({status}){more}{''.join(lines)}")


class Http:
    """Requests to one server's `/api/v1`; the address is looked up again when the server has gone away."""

    def __init__(self, server: str | None = None, token: str | None = None, timeout_s: float = 30.0) -> None:
        self._given = (server, token)
        self.connection: Connection = find_server(server, token)
        self._client = httpx.Client(timeout=httpx.Timeout(timeout_s, connect=5.0), follow_redirects=False)

    def close(self) -> None:
        self._client.close()

    def request(
        self, method: str, path: str, *, timeout_s: float | None = None, headers: Mapping[str, str] | None = None, **options: Any
    ) -> httpx.Response:
        """One request, tried again after a lost connection or a 503 if it is safe to send twice. Raises ApiError, ServerUnreachable."""
        headers = dict(headers or {})
        if timeout_s is not None:
            options["timeout"] = httpx.Timeout(timeout_s, connect=5.0)
        waits = iter(_RETRY_AFTER_S if method in _SAFE or "Idempotency-Key" in headers else ())
        while True:
            try:
                response = self._client.request(method, self._url(path), headers=self._headers(headers), **options)
            except httpx.TransportError as error:
                failure: Exception = ServerUnreachable(f"no answer from {self.connection.server}: {error or type(error).__name__}")
            else:
                if response.status_code < 400:
                    return response
                failure = problem(response)
                if response.status_code != 503:
                    raise failure
            wait_s = next(waits, None)
            if wait_s is None:
                raise failure
            time.sleep(wait_s)
            self.connection = find_server(*self._given)

    @contextmanager
    def stream(self, path: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0, **options: Any) -> Iterator[httpx.Response]:
        """A GET whose body is read as it comes. Raises ApiError, ServerUnreachable."""
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        try:
            with self._client.stream("GET", self._url(path), headers=self._headers(dict(headers or {})), timeout=timeout, **options) as response:
                if response.status_code >= 400:
                    response.read()
                    raise problem(response)
                yield response
        except httpx.TransportError as error:
            raise ServerUnreachable(f"no answer from {self.connection.server}: {error or type(error).__name__}") from error

    def _url(self, path: str) -> str:
        return f"{self.connection.server}/api/v1{path}"

    def _headers(self, headers: dict[str, str]) -> dict[str, str]:
        if self.connection.token:
            headers["Authorization"] = f"Bearer {self.connection.token}"
        return headers


def problem(response: httpx.Response) -> ApiError:
    """The problem document of `response`; for another body, its status."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return ApiError(response.status_code, response.reason_phrase or "refused")
    errors = body.get("errors")
    return ApiError(
        response.status_code,
        str(body.get("title") or response.reason_phrase),
        str(body.get("detail") or ""),
        errors if isinstance(errors, list) else None,
    )
