"""The ingest socket (docs/protocol.md section 4): frames in, acknowledgements and commands out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

from django.db import DatabaseError

from experiments.actions.attempt import IngestGrant, authenticate_ingest
from experiments.ingest.node import LastWordSession, NodeSession
from experiments.ingest.session import PUSH_INTERVAL_S, Answer, Session
from experiments.live.publish import stream_of
from experiments.live.reader import reader
from experiments.telemetry.frame import FrameError
from experiments.telemetry.write import FencedError
from experiments.threads import Threads

log = logging.getLogger(__name__)

FALLBACK_POLL_S = 2.0
"""How often the wanted state is looked up when nobody says that it has changed: cancel reaches the host within 3 s without Valkey."""
REFUSED, FENCED, TRY_LATER = 4400, 4409, 1013

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

threads = Threads("ingest", 8)


async def ingest(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The ASGI application of one socket."""
    await receive()
    run_id = scope["url_route"]["kwargs"]["run_id"]
    try:
        grant = await threads.run(_grant, scope, run_id)
        if grant is None:
            await send({"type": "websocket.close", "code": 4403})
            return
        await send({"type": "websocket.accept"})
        async with reader().subscribed(stream_of(run_id)) as news:
            kind = LastWordSession if grant.last_word else NodeSession if grant.node else Session
            session = kind(grant)
            await _Conversation(session, receive, send).hold(news)
    except DatabaseError as error:
        log.warning("ingest of run %s: the database is away: %s", run_id, error)
        await _close(send, TRY_LATER)


def _grant(scope: dict[str, Any], run_id: int) -> IngestGrant | None:
    headers = dict(scope["headers"])
    kind, _, bearer = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    asked = parse_qs(scope["query_string"].decode("latin-1"))
    numbers = [asked.get(name, ["0"])[0] for name in ("attempt", "node")]
    if kind.lower() != "bearer" or run_id >= 2**63 or not all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers):
        return None
    attempt, node = map(int, numbers)
    return authenticate_ingest(run_id, attempt, bearer.strip(), node, last_word="last_word" in asked)


async def _close(send: Send, code: int) -> None:
    with contextlib.suppress(RuntimeError, OSError):
        await send({"type": "websocket.close", "code": code})


class _Conversation:
    """The session's calls, one at a time, from three tasks: what is received, what is wanted, what viewers wait for."""

    def __init__(self, session: Session, receive: Receive, send: Send) -> None:
        self._session, self._receive, self._send_raw = session, receive, send
        self._one = asyncio.Lock()
        self._fresh = asyncio.Event()

    async def hold(self, news: Any) -> None:
        """Until one side closes."""
        try:
            await self._answer(await self._call(self._session.hello))
            tasks = [asyncio.create_task(task) for task in (self._listen(), self._command(news), self._push())]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            for task in done:
                task.result()
        except FencedError:
            await self._answer({"type": "fenced", "noted": self._session.ended})
            await _close(self._send_raw, FENCED)
        except FrameError as error:
            await self._answer({"type": "refused", "error": str(error)[:1000]})
            await _close(self._send_raw, REFUSED)
        finally:
            with contextlib.suppress(DatabaseError):
                await self._call(self._session.push)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        async with self._one:
            return await threads.run(function, *args)

    async def _answer(self, answer: Answer) -> None:
        await self._send_raw({"type": "websocket.send", "text": json.dumps(answer)})

    async def _listen(self) -> None:
        while (message := await self._receive())["type"] == "websocket.receive":
            data, text = message.get("bytes"), message.get("text")
            if data is not None:
                answer = await self._call(self._session.binary, data)
                self._fresh.set()
            else:
                answer = await self._call(self._session.text, text)
            await self._answer(answer)

    async def _command(self, news: Any) -> None:
        """Says what is wanted as soon as it changes."""
        clock = asyncio.get_running_loop().time
        looked_at = clock()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FALLBACK_POLL_S):
                    await news.news.wait()
            told, news.gap = news.gap, False
            while (heard := news.pop()) is not None:
                told |= heard.kind == "run"
            if told or clock() - looked_at >= FALLBACK_POLL_S:
                looked_at = clock()
                answer = await self._call(self._session.changed_command)
                if answer is not None:
                    await self._answer(answer)
            await asyncio.sleep(0.1)  # News come with every frame; this is soon enough.

    async def _push(self) -> None:
        """Tells viewers what came too soon after the last time."""
        while True:
            await self._fresh.wait()
            self._fresh.clear()
            due = self._session.push_due_s()
            if due <= PUSH_INTERVAL_S:
                await asyncio.sleep(max(due, 0))
                await self._call(self._session.push)
