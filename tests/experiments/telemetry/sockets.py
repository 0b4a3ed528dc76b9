"""The application's WebSockets, spoken to in-process as a server would."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from channels.routing import URLRouter

from experiments.routing import websocket_urlpatterns
from spec import block

APPLICATION = URLRouter(websocket_urlpatterns)
HOST, ORIGIN = (b"host", b"localhost"), (b"origin", b"http://localhost")


class Socket:
    """One connection. `reading.clear()` makes a client that has stopped reading: the server's next send waits."""

    def __init__(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        path, _, query = path.partition("?")
        scope = {"type": "websocket", "path": path, "query_string": query.encode(), "headers": headers, "subprotocols": []}
        self._in: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._out: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.reading = asyncio.Event()
        self.reading.set()
        self._task = asyncio.create_task(APPLICATION(scope, self._in.get, self._sent))
        self._in.put_nowait({"type": "websocket.connect"})

    async def _sent(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        self._out.put_nowait(message)

    async def output(self, timeout_s: float = 20) -> dict[str, Any]:
        """The server's next message. Raises what the application raised."""
        message = asyncio.create_task(self._out.get())
        done, _ = await asyncio.wait({message, self._task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if message not in done and self._task in done:
            self._task.result()
            await asyncio.wait({message}, timeout=0.1)
        if not message.done():
            message.cancel()
            raise TimeoutError("nothing came")
        return message.result()

    @property
    def over(self) -> bool:
        """Whether the server has let go of the connection."""
        return self._task.done()

    def send(self, data: bytes | str) -> None:
        self._in.put_nowait({"type": "websocket.receive", "bytes" if isinstance(data, bytes) else "text": data})

    async def close(self) -> None:
        self._in.put_nowait({"type": "websocket.disconnect", "code": 1000})
        self.reading.set()
        await asyncio.wait({self._task}, timeout=10)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@asynccontextmanager
async def socket(path: str, *headers: tuple[bytes, bytes]) -> AsyncIterator[Socket]:
    """An accepted socket. Raises AssertionError where it is refused."""
    opened = Socket(path, [HOST, *headers])
    try:
        assert (await opened.output())["type"] == "websocket.accept"
        yield opened
    finally:
        await opened.close()


async def accepted(path: str, *headers: tuple[bytes, bytes], host: tuple[bytes, bytes] = HOST) -> bool:
    """Whether the handshake is accepted."""
    opened = Socket(path, [host, *headers])
    answer = await opened.output()
    await opened.close()
    return bool(answer["type"] == "websocket.accept")


def bearer(token: str) -> tuple[bytes, bytes]:
    return (b"authorization", f"Bearer {token}".encode())


async def said(opened: Socket, timeout_s: float = 20) -> dict[str, Any]:
    """The next frame: text as it is, a block as {"type": "steps", "step": […], "arrays"…}; a close as {"type": "close", "code"}."""
    message = await opened.output(timeout_s)
    if message["type"] == "websocket.close":
        return {"type": "close", "code": message["code"]}
    if message.get("text"):
        return dict(json.loads(message["text"]))
    header, arrays = block.decode(message["bytes"])
    return {**header, "arrays": arrays, "step": arrays["step"].tolist()}


async def until(opened: Socket, kind: str, timeout_s: float = 20) -> dict[str, Any]:
    """The next frame of that type; others are passed over."""
    async with asyncio.timeout(timeout_s):
        while (frame := await said(opened, timeout_s))["type"] != kind:
            pass
    return frame
