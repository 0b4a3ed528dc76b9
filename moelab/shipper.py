"""Ships a run's spools and log to the server over the ingest WebSocket (docs/protocol.md, section 4), for as long as it takes.

While the server is away it tries again with a jittered back-off, and sends again whatever was not acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from moelab.outbox import Outbox, frame

HEARTBEAT_S = 3.0
SILENCE_S = 10.0
POLL_S = 0.02
LOG_EVERY_POLLS = 3
BACK_OFF_S = (0.5, 8.0)
LOG_CHUNK_BYTES = 256 * 1024
DENIALS = 3
_FENCED = 4409
_FENCED_TEXT = "a later attempt exists, or the run is over"

logger = logging.getLogger(__name__)


class Fenced(Exception):  # noqa: N818  an answer, not an error
    """A definite answer: this attempt may not write any more."""


class Denied(Fenced):
    """The server does not let this token write to the run: it is not the attempt's, or lacks the scope `ingest`."""


class Refused(Exception):  # noqa: N818  an answer, not an error
    """The server takes a frame for malformed."""


class Shipper:
    """Ships `boxes` (older attempts first, the attempt's own last) and, where there is one, the log of its own attempt."""

    def __init__(
        self,
        url: Callable[[], str],
        token: str,
        boxes: Sequence[Outbox],
        *,
        log: Path | None = None,
        on_command: Callable[[str, int], None] = lambda desired, checkpoint_requests: None,
        on_hosts: Callable[[str, Mapping[str, str] | None, bool | None], None] = lambda rendezvous, lost, hanging: None,
    ) -> None:
        """`url` is asked for the address at each connection; `on_command` hears (desired, checkpoint_requests), and `on_hosts`, of
        an attempt on several hosts, (where the ranks meet, the reason and detail of a host that has failed, whether the ranks stand still:
        None from a server that does not know the word)."""
        self._url, self._token, self._boxes, self._log = url, token, boxes, log
        self._on_command, self._on_hosts = on_command, on_hosts
        self._own = boxes[-1]
        self._said: dict[str, tuple[int, str]] = {}
        self._last_word = ""
        self.word_noted = False
        """Whether the server has taken what was said by `leave`."""
        self._last_seq: int | None = None
        self._log_sent = self._log_acked = 0
        self._heard = -math.inf
        self.connected = False
        self.error = ""

    async def run(self) -> None:
        """Returns once `finish` has been called and everything is acknowledged. Raises Fenced (and Denied, a kind of it)."""
        failures = denials = 0
        while not self.done:
            try:
                async with connect(
                    self._url(),
                    additional_headers={"Authorization": f"Bearer {self._token}"},
                    compression=None,
                    open_timeout=5,
                    close_timeout=1,
                    ping_interval=None,
                    max_size=1_000_000,
                ) as socket:
                    failures = denials = 0
                    await self._converse(socket)
                continue
            except InvalidStatus as error:
                denials = denials + 1 if error.response.status_code in (401, 403, 404) else 0
                self.error = f"HTTP {error.response.status_code}"
            except Refused as error:
                self.error = f"refused: {error}"
            except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed, ValueError, KeyError) as error:
                if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == _FENCED:
                    raise Fenced(error.rcvd.reason or _FENCED_TEXT) from None
                self.error = str(error) or type(error).__name__
            finally:
                self.connected = False
            if denials >= DENIALS:
                raise Denied("the server does not let this token write to the run")
            logger.warning("not connected: %s", self.error)
            least, most = BACK_OFF_S
            await asyncio.sleep(random.uniform(least, min(most, least * 2 ** min(failures + 1, 8))))  # noqa: S311  jitter
            failures += 1

    def finish(self, last_seq: int) -> None:
        """Nothing comes after record `last_seq` of the own attempt."""
        self._last_seq = last_seq

    def say(self, message: Mapping[str, Any]) -> None:
        """Sends a text frame now, and again at each new connection. Of each `type` only the last one is kept."""
        number = 1 + max((number for number, _ in self._said.values()), default=0)
        self._said[message["type"]] = (number, json.dumps(message))

    def leave(self, message: Mapping[str, Any]) -> None:
        """Sends a text frame once the whole log has been sent. The server answers `fenced`, which ends `run`."""
        self._last_word = json.dumps(message)

    def heard_within(self, seconds: float) -> bool:
        """Whether the server has said anything so lately; may be asked in any thread."""
        return time.monotonic() - self._heard <= seconds

    @property
    def done(self) -> bool:
        return self._last_seq is not None and self._own.acked >= self._last_seq and all(box.settled for box in self._boxes[:-1])

    @property
    def log_shipped(self) -> bool:
        """Whether the server has the whole log as it is now."""
        return self._log is None or self._log_acked >= _size(self._log)

    async def _converse(self, socket: ClientConnection) -> None:
        hello = _message(await asyncio.wait_for(socket.recv(), SILENCE_S))
        self._hear(hello)
        if hello.get("type") != "hello":
            raise ValueError(f"the server began with {hello.get('type')!r}")
        acked = {int(attempt): int(seq) for attempt, seq in hello["acked"].items()}
        for box in self._boxes:
            box.begin(acked.get(box.attempt, 0))
        self._log_sent = self._log_acked = int(hello.get("log_offset", 0))
        self.connected = True
        self.error = ""
        tasks = [asyncio.create_task(part) for part in (self._receive(socket), self._send(socket), self._beat(socket))]
        try:
            finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _receive(self, socket: ClientConnection) -> None:
        while not self.done:
            self._hear(_message(await socket.recv()))

    def _hear(self, message: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        kind = message.get("type")
        if kind == "ack":
            box = next((box for box in self._boxes if box.attempt == message["attempt"]), None)
            if box is not None:
                box.acknowledge(int(message["seq"]))
        elif kind == "log_ack":
            self._log_acked = int(message["offset"])
        elif kind == "fenced":
            self.word_noted = bool(message.get("noted"))
            raise Fenced(_FENCED_TEXT)
        elif kind == "refused":
            raise Refused(str(message.get("error", "")))
        if kind in ("hello", "command"):
            self._on_command(str(message["desired"]), int(message["checkpoint_requests"]))
            if hosts := message.get("hosts"):
                self._on_hosts(str(hosts["rendezvous"]), hosts["lost"], hosts.get("hanging"))

    async def _send(self, socket: ClientConnection) -> None:
        """Whole older attempts first; then the log in pieces and the own records, as they come."""
        said = 0
        for box in self._boxes[:-1]:
            while not box.sent:
                said = await self._tell(socket, said)  # other hosts wait for it
                if payloads := box.next_payloads():
                    await socket.send(frame(box.attempt, payloads))
                else:
                    await asyncio.sleep(POLL_S)
        idle_s, polls, whole_log = 0.0, 0, False
        while not self.done:
            polls += 1
            said = await self._tell(socket, said)
            if polls % LOG_EVERY_POLLS == 0 or self._last_seq is not None:
                whole_log = await self._send_log(socket)
                if whole_log and self._last_word:
                    self.say(json.loads(self._last_word))
                    self._last_word = ""
            # The run's last record ends the conversation, so the log goes before it.
            payloads = self._own.next_payloads() if whole_log or self._last_seq is None else []
            if payloads:
                await socket.send(frame(self._own.attempt, payloads))
                idle_s = 0.0
            else:
                wait_s = POLL_S if idle_s < 5 else 2 * POLL_S
                idle_s += wait_s
                await asyncio.sleep(wait_s)

    async def _tell(self, socket: ClientConnection, said: int) -> int:
        """Sends what is to be said beside the records and has a number above `said`; the last number."""
        for number, message in sorted(self._said.values()):
            if number > said:
                await socket.send(message)
                said = number
        return said

    async def _send_log(self, socket: ClientConnection) -> bool:
        """Sends the next piece of the log, unless much is unacknowledged. True if nothing more is to be sent now."""
        if self._log is None:
            return True
        size = _size(self._log)
        if self._log_sent < size and self._log_sent - self._log_acked < 4 * LOG_CHUNK_BYTES:
            data = _read_at(self._log, self._log_sent)
            await socket.send(b"L" + struct.pack("<Q", self._log_sent) + data)
            self._log_sent += len(data)
        return self._log_sent >= size

    async def _beat(self, socket: ClientConnection) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if not self.heard_within(SILENCE_S):
                raise TimeoutError(f"the server has been silent for {SILENCE_S:.0f} s")
            await socket.send('{"type":"heartbeat"}')


def _message(frame: str | bytes) -> dict[str, Any]:
    message = json.loads(frame)
    if not isinstance(message, dict):
        raise ValueError("the server sent something that is no message")
    return message


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_at(path: Path, offset: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    try:
        return os.pread(fd, LOG_CHUNK_BYTES, offset)
    finally:
        os.close(fd)
