"""The server's side of docs/protocol.md, section 4, over a real WebSocket, with memory for a store. It can go away and come back."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from spec import events


@dataclass
class IngestServer:
    """Start it, stop it, start it again: what it was told stays. `records[attempt]` holds payloads by their order."""

    token: str = "mlr_test"
    records: dict[int, list[bytes]] = field(default_factory=dict)
    log: dict[int, bytes] = field(default_factory=dict)
    hosts: dict[str, Any] | None = None
    told: list[dict[str, Any]] = field(default_factory=list)
    desired: str = "run"
    checkpoint_requests: int = 0
    fenced: bool = False
    heartbeats: int = 0
    connections: int = 0
    duplicates: int = 0
    ack_twice: bool = False
    drop_acks: int = 0
    ack_after_s: float = 0.0
    frames: int = 0
    cut_after_frames: int = 0
    problems: list[str] = field(default_factory=list)
    port: int = 0
    _server: Server | None = None
    _open: set[ServerConnection] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> IngestServer:
        self._server = serve(self._serve, "127.0.0.1", self.port, compression=None, max_size=4_000_000, process_request=self._check)
        self.port = self._server.socket.getsockname()[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        """Goes away at once, as a killed process does."""
        if self._server is not None:
            self._server.shutdown()
            for connection in list(self._open):
                with contextlib.suppress(OSError):
                    connection.socket.shutdown(2)
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, desired: str | None = None, checkpoint_requests: int | None = None) -> None:
        """Wants something of the supervisor, and tells it at once."""
        self.desired = desired or self.desired
        self.checkpoint_requests = checkpoint_requests or self.checkpoint_requests
        self.tell(self._wish())

    def fence(self) -> None:
        self.fenced = True
        for connection in list(self._open):
            with contextlib.suppress(ConnectionClosed):
                connection.send('{"type":"fenced"}')
                connection.close(4409)

    def tell(self, message: dict[str, Any]) -> None:
        for connection in list(self._open):
            with contextlib.suppress(ConnectionClosed):
                connection.send(json.dumps(message))

    # ----- what was received

    def events(self, attempt: int = 1) -> list[events.Event]:
        return [events.decode(payload) for payload in self.records.get(attempt, [])]

    def steps(self, attempt: int = 1) -> list[int]:
        return [event.step for event in self.events(attempt) if isinstance(event, events.StepDone)]

    def ended(self, attempt: int = 1) -> events.RunEnded | None:
        return next((event for event in self.events(attempt) if isinstance(event, events.RunEnded)), None)

    def wait(self, what: Any, timeout_s: float = 20.0) -> Any:
        """The first true value of `what()`. Fails after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if value := what():
                return value
            time.sleep(0.02)
        raise AssertionError(f"not within {timeout_s} s; steps {self.steps()[-3:]}, problems {self.problems}, connections {self.connections}")

    # ----- the protocol

    def _check(self, connection: ServerConnection, request: Any) -> Any:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return connection.respond(403, "no\n")
        return None

    def _wish(self) -> dict[str, Any]:
        wish = {"type": "command", "desired": self.desired, "checkpoint_requests": self.checkpoint_requests}
        return wish if self.hosts is None else wish | {"hosts": self.hosts}

    def _serve(self, connection: ServerConnection) -> None:
        self.connections += 1
        self._open.add(connection)
        own = int(connection.request.path.partition("attempt=")[2].partition("&")[0])
        try:
            if self.fenced and "last_word" not in connection.request.path:
                connection.send('{"type":"fenced"}')
                connection.close(4409)
                return
            place = {attempt: len(records) for attempt, records in self.records.items()}
            acked = {str(attempt): seq for attempt, seq in place.items()}
            hello = self._wish() | {"type": "hello", "acked": acked, "log_offset": len(self.log.get(own, b""))}
            connection.send(json.dumps(hello))
            for number, message in enumerate(connection, 1):
                self._take(connection, own, place, message)
                if self.cut_after_frames and number >= self.cut_after_frames:
                    connection.socket.shutdown(2)
                    return
        except (ConnectionClosed, OSError):
            pass
        except Exception as error:  # a test must see what the server did not expect
            self.problems.append(repr(error))
        finally:
            self._open.discard(connection)

    def _take(self, connection: ServerConnection, own: int, place: dict[int, int], message: str | bytes) -> None:
        if isinstance(message, str):
            self._hear(connection, json.loads(message))
        elif message[:1] == b"L":
            (offset,) = struct.unpack_from("<Q", message, 1)
            kept = self.log.get(own, b"")
            assert offset <= len(kept), f"log gap: {offset} > {len(kept)}"
            self.log[own] = kept[:offset] + message[9:]
            connection.send(json.dumps({"type": "log_ack", "offset": len(self.log[own])}))
        else:
            assert message[:1] == b"E"
            self._store(connection, place, message)

    def _hear(self, connection: ServerConnection, message: dict[str, Any]) -> None:
        """A heartbeat; what a host says of a storage; or what one of several says: where the ranks meet, which all hear, and that it has left."""
        if message == {"type": "heartbeat"}:
            self.heartbeats += 1
        elif message["type"] in ("stored", "damaged"):
            self.told.append(message)
        else:
            assert self.hosts is not None
            self.told.append(message)
            if message["type"] == "left":
                connection.send('{"type":"fenced","noted":true}')
                connection.close(4409)
                return
            self.hosts = self.hosts | ({"hanging": True} if message["type"] == "hanging" else {"rendezvous": message["at"]})
            self.tell(self._wish())
        connection.send(json.dumps(self._wish()))

    def _store(self, connection: ServerConnection, place: dict[int, int], message: bytes) -> None:
        (attempt,) = struct.unpack_from("<I", message, 1)
        self.frames += 1
        time.sleep(self.ack_after_s)
        with self._lock:
            kept = self.records.setdefault(attempt, [])
            offset, received = 5, []
            while offset < len(message):
                length, crc = struct.unpack_from("<II", message, offset)
                payload = message[offset + 8 : offset + 8 + length]
                assert zlib.crc32(payload) == crc
                received.append(payload)
                offset += 8 + length
            start = place.get(attempt, 0)
            place[attempt] = start + len(received)
            self.duplicates += min(len(received), len(kept) - start)
            assert kept[start : start + len(received)] == received[: len(kept) - start]
            kept += received[len(kept) - start :]
            if self.drop_acks > 0:  # stored, and the connection breaks before anybody is told
                self.drop_acks -= 1
                connection.socket.shutdown(2)
                return
            ack = json.dumps({"type": "ack", "attempt": attempt, "seq": len(kept)})
        connection.send(ack)
        if self.ack_twice:
            connection.send(ack)
