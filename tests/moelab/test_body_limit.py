"""Bodies that are too large end at the door, however they are sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from moelab.body_limit import LIMIT_BYTES, BodyLimit


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def chunks(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 60_000):
        yield b"x" * min(60_000, size - start)


def body(size: int, chunked: bool) -> Any:
    return chunks(size) if chunked else b"x" * size


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(0, 200), (LIMIT_BYTES, 200), (LIMIT_BYTES + 1, 413), (5 * LIMIT_BYTES, 413)])
async def test_the_limit_holds_with_and_without_a_length(size: int, status: int, chunked: bool) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=BodyLimit(echo)), base_url="http://test") as client:
        answer = await client.post("/", content=body(size, chunked))
    assert answer.status_code == status
    if status == 200:
        assert answer.text == str(size)
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert str(LIMIT_BYTES) in answer.json()["detail"]
        assert answer.json()["type"] == "urn:moelab:problem:too-large"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
