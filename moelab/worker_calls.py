"""The client's calls of a host that trains and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moelab.calls import Calls, Json, as_json


class WorkerCalls(Calls):
    """Saying that one is there, taking work, and answering."""

    def hello(self, *, name: str, host: str, pid: int, version: str, devices: Sequence[Mapping[str, Any]], slots: int, storage: str = "") -> int:
        """Registers this host, which is also its sign of life; returns the worker's id."""
        body = {"name": name, "host": host, "pid": pid, "version": version, "devices": list(devices), "slots": slots}
        if storage:
            body["storage"] = storage
        return int(self._post("/worker/hello", body)["worker"])

    def claim(self, *, worker: int, free_slots: int, free_devices: Sequence[str]) -> Json | None:
        """A run for this host to start, or None."""
        body = {"worker": worker, "free_slots": free_slots, "free_devices": list(free_devices)}
        response = self.http.request("POST", "/worker/claim", json=body)
        return None if response.status_code == 204 else as_json(response)

    def claim_generation(self, *, worker: int) -> Json | None:
        """A generation for this host to answer, or None."""
        response = self.http.request("POST", "/worker/generations/claim", json={"worker": worker})
        return None if response.status_code == 204 else as_json(response)

    def keep_generation(self, generation_id: int, *, attempt: int) -> None:
        """Says that this host is still at it; an ApiError of status 409 says that it is no longer its own."""
        self._post(f"/worker/generations/{generation_id}/heartbeat", {"attempt": attempt})

    def answer_generation(self, generation_id: int, *, attempt: int, outcome: Literal["succeeded", "failed", "not_here"], **said: Any) -> None:
        """Ends a generation, with its `result`, or with `reason` and `detail`; or sends it on to another host."""
        self._post(f"/worker/generations/{generation_id}/answer", {"attempt": attempt, "outcome": outcome, **said})
