"""One reader of Valkey for each event loop: it hears the streams that have viewers and hands each message to all of them.

While Valkey is away, and once when it is back, every subscriber is told that it has missed something; it then looks into
the store. Nothing is lost that way, and nobody is disconnected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import weakref
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from django.conf import settings
from redis import RedisError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from spec import block

log = logging.getLogger(__name__)

BLOCK_MS = 5000
AWAY_S = 1.0
QUEUE_BYTES = 256 * 1024
"""What a viewer may leave unread; one message may be larger."""


@dataclass(frozen=True)
class Heard:
    """A message as the stream had it. Of a steps block, the first and the last step that it answers for."""

    kind: str
    data: bytes
    first: int = 0
    last: int = 0


class Subscription:
    """What one viewer has not yet been sent: bounded, and honest about what was thrown away."""

    def __init__(self) -> None:
        self._items: deque[Heard] = deque()
        self._size = 0
        self.gap = False
        self.news = asyncio.Event()

    def push(self, heard: Heard) -> None:
        if self.gap:
            return
        if self._items and self._size + len(heard.data) > QUEUE_BYTES:
            self.missed()
            return
        self._items.append(heard)
        self._size += len(heard.data)
        self.news.set()

    def missed(self) -> None:
        """Forgets what is queued: the store has it all."""
        self._items.clear()
        self._size = 0
        self.gap = True
        self.news.set()

    def pop(self) -> Heard | None:
        """The oldest message, or None."""
        if not self._items:
            if not self.gap:  # Or nobody would wake for it: nothing is queued any more while there is a gap.
                self.news.clear()
            return None
        heard = self._items.popleft()
        self._size -= len(heard.data)
        return heard


class Reader:
    """Reads while anybody is subscribed."""

    def __init__(self) -> None:
        self._subscribers: dict[str, set[Subscription]] = {}
        self._after: dict[str, bytes | None] = {}
        self._wake = f"moelab:wake:{secrets.token_hex(8)}"
        self._task: asyncio.Task[None] | None = None
        self._client: redis.asyncio.Redis | None = None

    @contextlib.asynccontextmanager
    async def subscribed(self, stream: str) -> AsyncIterator[Subscription]:
        """A Subscription to all that is added to `stream` from now on."""
        subscription = Subscription()
        self._subscribers.setdefault(stream, set()).add(subscription)
        try:
            if self._after.get(stream) is None:
                await self._begin(stream)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._run(), name="live reader")
            yield subscription
        finally:
            self._subscribers[stream].discard(subscription)
            if not self._subscribers[stream]:
                del self._subscribers[stream]
                self._after.pop(stream, None)
            if not self._subscribers and self._task is not None:
                self._task.cancel()
                self._task = None

    def _connected(self) -> redis.asyncio.Redis:
        if self._client is None:
            # A blocking read is as long as it is (BLOCK_MS): the timeout is around it, in _listen.
            self._client = redis.asyncio.Redis.from_url(
                settings.REDIS_URL, socket_timeout=None, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)
            )
        return self._client

    async def _begin(self, stream: str) -> None:
        """Notes where `stream` ends now, and makes the pending read take it in."""
        try:
            async with asyncio.timeout(1):
                client = self._connected()
                self._after[stream] = await _end(client, stream)
                await client.xadd(self._wake, {"w": 1}, maxlen=1, approximate=False)
                await client.expire(self._wake, 3600)
        except (RedisError, OSError, TimeoutError):
            self._after[stream] = None

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._listen()
                except (RedisError, OSError, TimeoutError) as error:
                    log.warning("live: Valkey is away (%s); viewers read the store", error)
                    await self._close()
                    for stream in self._after:
                        self._after[stream] = None
                    self._everyone_missed()
                    await asyncio.sleep(AWAY_S)
        finally:
            await self._close()

    async def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await client.aclose()

    async def _listen(self) -> None:
        client = self._connected()
        async with asyncio.timeout(5):
            wake = await _end(client, self._wake)
        while True:
            for stream in [stream for stream in self._subscribers if self._after.get(stream) is None]:
                async with asyncio.timeout(5):
                    self._after[stream] = await _end(client, stream)
                for subscription in self._subscribers.get(stream, ()):
                    subscription.missed()
            streams: dict[Any, Any] = {stream: after for stream, after in self._after.items() if after is not None}
            async with asyncio.timeout(BLOCK_MS / 1000 + 5):
                found = await client.xread({**streams, self._wake: wake}, block=BLOCK_MS, count=500)
            for name, entries in found:
                stream, newest = name.decode(), entries[-1][0]
                if stream == self._wake:
                    wake = newest
                elif stream in self._after:
                    self._after[stream] = newest
                    self._hand_out(stream, [fields for _, fields in entries])

    def _hand_out(self, stream: str, entries: list[dict[bytes, bytes]]) -> None:
        for fields in entries:
            heard = _heard(fields)
            for subscription in self._subscribers.get(stream, ()):
                if heard.kind == "missed":
                    subscription.missed()
                else:
                    subscription.push(heard)

    def _everyone_missed(self) -> None:
        for subscriptions in self._subscribers.values():
            for subscription in subscriptions:
                subscription.missed()


async def _end(client: redis.asyncio.Redis, stream: str) -> bytes:
    newest = await client.xrevrange(stream, count=1)
    return newest[0][0] if newest else b"0-0"


def _heard(fields: dict[bytes, bytes]) -> Heard:
    if b"r" in fields:
        return Heard("run", fields[b"r"])
    kind, data = fields[b"k"].decode(), fields[b"d"]
    if kind in ("steps", "late"):
        header, _ = block.decode(data)
        return Heard(kind, data, header["from"], header["to"])
    return Heard(kind, data)


_readers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Reader] = weakref.WeakKeyDictionary()


def reader() -> Reader:
    """The reader of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _readers:
        _readers[loop] = Reader()
    return _readers[loop]
