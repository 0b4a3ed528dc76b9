"""Waiting for a run, and following its log, through restarts of the server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moelab.http import ApiError, ServerUnreachable
from moelab.sse import messages

if TYPE_CHECKING:
    from moelab.client import Client
    from moelab.generation_calls import GenerationCalls

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
PATIENCE_S = 60.0
_AWAY = frozenset({502, 503, 504})


class Patience:
    """Bears a server that is away, for a while each time."""

    def __init__(self, limit_s: float | None) -> None:
        """At most `limit_s` seconds, else PATIENCE_S."""
        self._limit_s = PATIENCE_S if limit_s is None else limit_s
        self.heard()

    def heard(self) -> None:
        """The server has answered."""
        self._heard_at = time.monotonic()

    def bear(self, error: ApiError | ServerUnreachable) -> None:
        """Waits a moment; raises `error` if it is an answer, or if the server has been away for too long."""
        away = isinstance(error, ServerUnreachable) or error.status in _AWAY
        if not away or time.monotonic() - self._heard_at > self._limit_s:
            raise error
        time.sleep(0.5)


def wait(client: Client, run_id: int, timeout_s: float | None, patience_s: float | None) -> dict[str, Any]:
    """The run once it has ended. Raises TimeoutError after `timeout_s`."""
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    patience = Patience(patience_s)
    while (left := deadline - time.monotonic()) > 0:
        try:
            run = client.run(run_id, wait="terminal", timeout_s=min(30.0, max(1.0, left)))
        except (ServerUnreachable, ApiError) as error:
            patience.bear(error)
            continue
        patience.heard()
        if run["state"] in TERMINAL:
            return run
        time.sleep(0.1)
    raise TimeoutError(f"run {run_id} has not ended within {timeout_s} s")


def wait_for_generation(client: GenerationCalls, made: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The generation once it has succeeded or failed. Raises TimeoutError."""
    deadline, patience = time.monotonic() + timeout_s, Patience(None)
    while made["state"] in ("queued", "running"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"generation {made['id']} of run {made['run']} has not ended within {timeout_s:.0f} s")
        time.sleep(0.25)
        try:
            made = client.generation(made["run"], made["id"])
        except (ServerUnreachable, ApiError) as error:
            patience.bear(error)
        else:
            patience.heard()
    return made


def follow_logs(client: Client, run_id: int, offset: int, patience_s: float | None) -> Iterator[str]:
    """Pieces of the log from byte `offset` on, until the run has ended and all was read."""
    patience = Patience(patience_s)
    while True:
        try:
            with client.http.stream(f"/runs/{run_id}/logs/follow", headers={"Last-Event-ID": str(offset)}, params={"offset": offset}) as response:
                for message in messages(response.iter_lines()):
                    patience.heard()
                    if message.event == "end":
                        return
                    if message.event == "message" and message.data:
                        yield json.loads(message.data)["text"]
                    if message.id.isdigit():
                        offset = int(message.id)
            time.sleep(0.1)  # cut off, and not by an error: the server is going down
        except (ServerUnreachable, ApiError) as error:
            patience.bear(error)
