"""The sockets of browsers (docs/protocol.md section 6): one run, or the list of all runs that the viewer may see.

A viewer has a place (its last step and its last event). Messages that continue it are passed on as they are; whenever
something is missing, be it because the viewer was slow or because Valkey was away, the store is asked for what came after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

from django.db import DatabaseError

from experiments.live import access, snapshot
from experiments.live.publish import ALL_RUNS, stream_of
from experiments.live.reader import Heard, Subscription, reader
from experiments.live.trim import after_step

log = logging.getLogger(__name__)

RECHECK_S = 4.0
STUCK_S = 30.0
RUN_EVERY_S = 0.5
REFETCH_EVERY_S = 1.0
RETRY_S = 1.0
MESSAGE_BYTES, MESSAGES_PER_S = 4096, 20
GOING_AWAY, POLICY, TOO_BIG, TRY_LATER, DENIED = 1001, 1008, 1009, 1013, 4403

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Closed(Exception):  # noqa: N818  the end of a conversation, not an error
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Socket:
    """What both kinds of viewers share: pings, access that can end, a client that must read."""

    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._raw_send = scope, receive, send

    async def hold(self) -> None:
        """From the handshake to the end."""
        await self._receive()
        try:
            if not await snapshot.threads.run(self.admitted):
                await self._raw_send({"type": "websocket.close", "code": DENIED})
                return
            await self._raw_send({"type": "websocket.accept"})
            async with reader().subscribed(self.stream()) as subscription:
                await self._until_one_ends(self._listen(), self._recheck(), self.show(subscription))
        except _Closed as closed:
            await self._close(closed.code)
        except DatabaseError as error:
            log.warning("live: the database is away: %s", error)
            await self._close(TRY_LATER)

    def admitted(self) -> bool:
        raise NotImplementedError

    def stream(self) -> str:
        raise NotImplementedError

    async def show(self, subscription: Subscription) -> None:
        raise NotImplementedError

    async def text(self, message: dict[str, Any]) -> None:
        await self.raw_text(json.dumps(message, allow_nan=False))

    async def raw_text(self, message: str) -> None:
        await self._send({"type": "websocket.send", "text": message})

    async def binary(self, data: bytes) -> None:
        await self._send({"type": "websocket.send", "bytes": data})

    async def _send(self, message: dict[str, Any]) -> None:
        """Waits while the client's buffers are full, but not for ever."""
        try:
            # Not wait_for: before Python 3.12 it can swallow a cancellation, and the socket would never end.
            async with asyncio.timeout(STUCK_S):
                await self._raw_send(message)
        except TimeoutError:
            raise _Closed(TRY_LATER) from None

    async def _close(self, code: int) -> None:
        with contextlib.suppress(TimeoutError, RuntimeError, OSError):
            await asyncio.wait_for(self._raw_send({"type": "websocket.close", "code": code}), 1)

    @staticmethod
    async def _until_one_ends(*coroutines: Any) -> None:
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> None:
        clock = asyncio.get_running_loop().time
        second, count = clock(), 0
        while (message := await self._receive())["type"] == "websocket.receive":
            content = message.get("text") or message.get("bytes") or ""
            if len(content) > MESSAGE_BYTES:
                raise _Closed(TOO_BIG)
            if clock() - second > 1:
                second, count = clock(), 0
            count += 1
            if count > MESSAGES_PER_S:
                raise _Closed(POLICY)
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                if json.loads(content).get("type") == "ping":
                    await self.text({"type": "pong"})

    async def _recheck(self) -> None:
        """A right that was taken away ends the socket within seconds."""
        while True:
            await asyncio.sleep(RECHECK_S)
            try:
                if not await snapshot.threads.run(self.admitted):
                    raise _Closed(DENIED)
            except DatabaseError:
                continue  # Nobody can have lost a right that nobody can look up; the next round decides.


class _RunViewer(_Socket):
    def __init__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self._run_id: int = scope["url_route"]["kwargs"]["run_id"]
        self._last = self._last_event = 0
        self._run_due: float | None = None
        self._run_sent = self._refetch_sent = 0.0
        self._refetch_from: int | None = None
        self._clock = asyncio.get_running_loop().time

    def admitted(self) -> bool:
        return access.may_watch(self._scope, self._run_id)

    def stream(self) -> str:
        return stream_of(self._run_id)

    async def show(self, subscription: Subscription) -> None:
        self._last, self._last_event = await snapshot.threads.run(snapshot.position, self._run_id)
        found = await snapshot.shared(("run", self._run_id), snapshot.run_of, self._run_id)
        if found is None:
            raise _Closed(GOING_AWAY)
        after, event = self._asked("after"), self._asked("event")
        last, self._last = self._last, self._last if after is None else after
        self._last_event = self._last_event if event is None else event
        await self.raw_text(f'{{"type": "hello", "last_step": {last}, "last_event": {self._last_event}, "run": {found[1]}}}')
        if after is not None or event is not None:
            await self._fill()
        while True:
            await self._wait(subscription)
            if subscription.gap:
                subscription.gap = False
                await self._fill()
            while (heard := subscription.pop()) is not None:
                await self._pass_on(heard)
                if subscription.gap:
                    break
            await self._say_what_is_due()

    def _asked(self, name: str) -> int | None:
        """A number of the query."""
        given = parse_qs(self._scope["query_string"].decode("latin-1")).get(name, [""])[0]
        return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else None

    async def _wait(self, subscription: Subscription) -> None:
        due = [self._run_due] if self._run_due is not None else []
        due += [self._refetch_sent + REFETCH_EVERY_S] if self._refetch_from is not None else []
        timeout = max(0.0, min(due) - self._clock()) if due else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await subscription.news.wait()

    async def _pass_on(self, heard: Heard) -> None:
        if heard.kind in ("steps", "late") and self._refetch_from is not None:
            # Part of what the viewer is about to fetch: with later steps and without these, a broken connection would leave a hole for ever.
            self._refetch(heard.first, heard.last)
        elif heard.kind == "steps":
            if heard.last <= self._last:
                return
            if heard.first > self._last + 1:
                await self._fill()
                return
            await self.binary(heard.data if heard.first == self._last + 1 else after_step(heard.data, self._last))
            self._last = heard.last
        elif heard.kind == "late":
            await self.binary(heard.data)
            self._last = max(self._last, heard.last)
        elif heard.kind == "refetch":
            self._refetch(self._last + 1, int(heard.data))
        elif heard.kind == "rewind":
            await self._rewind(int(heard.data), int(heard.data))
        elif heard.kind == "event":
            event = json.loads(heard.data)
            if event["id"] > self._last_event:
                self._last_event = event["id"]
                await self.text({"type": "event", "event": event})
        elif heard.kind == "log":
            await self.text({"type": "log", **json.loads(heard.data)})
        elif heard.kind == "run":
            self._run_changed()

    def _run_changed(self) -> None:
        if self._run_due is None:
            self._run_due = max(self._clock(), self._run_sent + RUN_EVERY_S)

    def _refetch(self, first: int, last: int) -> None:
        """Steps first … last are in the store and will not be pushed."""
        if last >= first:
            self._refetch_from = first if self._refetch_from is None else min(first, self._refetch_from)
            self._last = max(self._last, last)

    async def _rewind(self, step: int, last: int) -> None:
        """The steps after `step` have been archived: what the viewer has of them is void, and it fetches what there is, up to `last` or further.

        Said at once, before the event that explains it: whoever has that one is not told again after a broken connection. Who has fetched goes on
        from the event that it names.
        """
        first = min(step, self._last) + 1
        self._refetch_from = first if self._refetch_from is None else min(first, self._refetch_from)
        self._last = last
        self._refetch_sent = 0.0
        await self._say_what_is_due()

    async def _fill(self) -> None:
        """Sends what the store has beyond this viewer's place. Waits for a database that is away."""
        while True:
            key = ("missed", self._run_id, self._last, self._last_event)
            try:
                missed = await snapshot.shared(key, snapshot.missed, self._run_id, self._last, self._last_event)
                break
            except DatabaseError:
                await asyncio.sleep(RETRY_S)
        self._last_event = max(self._last_event, missed.last_event)
        if missed.void_after is not None:
            await self._rewind(missed.void_after, missed.last)
        elif missed.too_many or self._refetch_from is not None:
            self._refetch(self._last + 1, missed.last)
        elif missed.block is not None:
            await self.binary(missed.block)
            self._last = missed.last
        for event in missed.events:
            await self.text({"type": "event", "event": event})
        self._run_changed()
        if len(missed.events) >= snapshot.FILL_EVENTS:
            await self._fill()

    async def _say_what_is_due(self) -> None:
        now = self._clock()
        if self._refetch_from is not None and now >= self._refetch_sent + REFETCH_EVERY_S:
            first, self._refetch_from, self._refetch_sent = self._refetch_from, None, now
            await self.text({"type": "resync", "from_step": first, "last_event": self._last_event})
        if self._run_due is not None and now >= self._run_due:
            self._run_due, self._run_sent = None, now
            with contextlib.suppress(DatabaseError):
                found = await snapshot.shared(("run", self._run_id), snapshot.run_of, self._run_id)
                if found is None:
                    raise _Closed(GOING_AWAY)
                await self.raw_text(f'{{"type": "run", "run": {found[1]}}}')


class _ListViewer(_Socket):
    """All runs that the viewer may see, each at most twice a second."""

    _projects: frozenset[int] = frozenset()

    def admitted(self) -> bool:
        projects = access.watched_projects(self._scope)
        self._projects = projects or frozenset()
        return projects is not None

    def stream(self) -> str:
        return ALL_RUNS

    async def show(self, subscription: Subscription) -> None:
        await self.text({"type": "hello"})
        while True:
            await subscription.news.wait()
            changed: dict[int, None] = {}
            if subscription.gap:
                subscription.gap = False
                await self.text({"type": "resync"})
            while (heard := subscription.pop()) is not None:
                changed[int(heard.data)] = None
            for run_id in changed:
                with contextlib.suppress(DatabaseError):
                    found = await snapshot.shared(("run", run_id), snapshot.run_of, run_id)
                    if found is not None and found[0] in self._projects:
                        await self.raw_text(f'{{"type": "run", "run": {found[1]}}}')
            await asyncio.sleep(RUN_EVERY_S)


async def run_viewer(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The ASGI application of `/ws/runs/<run>/`."""
    await _RunViewer(scope, receive, send).hold()


async def list_viewer(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The ASGI application of `/ws/runs/`."""
    await _ListViewer(scope, receive, send).hold()
