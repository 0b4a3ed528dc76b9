"""The conversation with a host of a run other than the first: its heartbeat, its log, and how its ranks ended. Events come from node 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.actions.attempt import Command
from experiments.actions.node import hosts_of, leave_node, present, renew_node
from experiments.ingest.session import Answer, Session, answer_of
from experiments.models.node import Node
from experiments.telemetry.frame import FrameError
from experiments.telemetry.write import FencedError
from spec.text import Storable


class Left(BaseModel):
    """A node's last word."""

    model_config = ConfigDict(extra="ignore")

    outcome: Literal["succeeded", "failed", "cancelled", "paused"]
    reason: Storable = ""
    detail: Storable = ""


class NodeSession(Session):
    """A Session of one node, with its lease instead of the run's."""

    def hello(self) -> Answer:
        """Raises FencedError."""
        self._command = self.command()
        offset = Node.objects.values_list("log_offset", flat=True).get(**self._place)
        return answer_of(self._command) | {"type": "hello", "acked": {}, "log_offset": offset}

    @property
    def _place(self) -> dict[str, int]:
        return {"run_id": self.grant.run_id, "attempt": self.grant.attempt, "rank": self.grant.node}

    def command(self) -> Command:
        """What the server wants now. Raises FencedError where the node has left, or its attempt counts no more."""
        row = present(**self._place).values_list("run__desired", "run__checkpoint_requests").first()
        if row is None:
            raise FencedError
        return Command(*row, hosts_of(self.grant.run_id, self.grant.attempt))

    def _told(self, kind: Any, message: Mapping[str, Any]) -> Command:
        if kind == "left":
            try:
                left = Left.model_validate(message)
            except ValidationError as error:
                raise FrameError(f"left: {error.errors(include_url=False)[0]['msg']}") from error
            leave_node(**self._place, outcome=left.outcome, reason=left.reason, detail=left.detail[:4000])
        elif kind != "heartbeat":
            raise FrameError(f"unknown text frame {kind!r:.40}")
        elif not renew_node(**self._place):
            raise FencedError
        return self.command()

    def _events(self, data: bytes) -> Answer:
        raise FrameError("events come from node 0")
