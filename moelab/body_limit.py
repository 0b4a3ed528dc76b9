"""Requests whose body is too large are answered before Django sees them: it would first write the whole body to disk."""

from __future__ import annotations

import uuid
from typing import Any

from experiments.api.problems import MEDIA_TYPE, TITLES, ProblemDocument

LIMIT_BYTES = 1_000_000


class _TooLargeError(Exception):
    pass


class BodyLimit:
    """ASGI middleware: 413 as a problem document for a body of more than LIMIT_BYTES, whatever its Content-Length claims."""

    def __init__(self, application: Any) -> None:
        self._application = application

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if _declared(scope) > LIMIT_BYTES:
            await _refuse(send)
            return
        received, answered = 0, False

        async def counted() -> dict[str, Any]:
            nonlocal received
            message: dict[str, Any] = await receive()
            received += len(message.get("body", b""))
            if received > LIMIT_BYTES:
                raise _TooLargeError
            return message

        async def watched(message: dict[str, Any]) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._application(scope, counted, watched)
        except _TooLargeError:
            if not answered:
                await _refuse(send)


def _declared(scope: dict[str, Any]) -> int:
    value = dict(scope["headers"]).get(b"content-length", b"0")
    return int(value) if value.isdigit() else 0


async def _refuse(send: Any) -> None:
    status, title = TITLES["too-large"]
    problem = ProblemDocument(
        type="urn:moelab:problem:too-large",
        title=title,
        status=status,
        detail=f"the body has more than {LIMIT_BYTES} bytes",
        request_id=uuid.uuid4().hex,
    )
    body = problem.model_dump_json(exclude_none=True).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    headers.append((b"x-request-id", problem.request_id.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
