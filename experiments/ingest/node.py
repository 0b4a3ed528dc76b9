"""The conversation with a host of a run other than the first: its heartbeat, its log, and how its ranks ended. Events come from node 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.actions.attempt import Command
from experiments.actions.node import LastWord, ended_by_others, hosts_of, leave_node, present, renew_node
from experiments.ingest.session import Answer, Session, answer_of
from experiments.models.node import Node
from experiments.telemetry.frame import FrameError
from experiments.telemetry.write import FencedError
from spec.text import Storable

TAIL_CHARS = 32_000


class Left(BaseModel):
    """A node's last word. `stopped`: its ranks were killed because the attempt was over."""

    model_config = ConfigDict(extra="ignore")

    outcome: Literal["succeeded", "failed", "cancelled", "paused", "stopped"]
    reason: Storable = ""
    detail: Storable = ""
    exit_code: int | None = Field(None, ge=-(2**31), lt=2**31)
    signal: int | None = Field(None, ge=0, lt=2**31)
    log_tail: Storable = ""

    @property
    def word(self) -> LastWord:
        """Cut to what is kept."""
        return LastWord(self.outcome, self.reason, self.detail[:4000], self.exit_code, self.signal, self.log_tail[-TAIL_CHARS:])


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
            self.ended = leave_node(**self._place, word=left.word)
        elif kind != "heartbeat":
            raise FrameError(f"unknown text frame {kind!r:.40}")
        elif not renew_node(**self._place):
            raise FencedError
        return self.command()

    def _events(self, data: bytes) -> Answer:
        raise FrameError("events come from node 0")


class LastWordSession(NodeSession):
    """A NodeSession of a node that was fenced before it could say how its ranks ended: it says that, behind the rest of its log."""

    def command(self) -> Command:
        """Nothing is wanted. Raises FencedError where no last word is waited for."""
        if self.ended or not ended_by_others(**self._place).exists():
            raise FencedError
        return Command("cancel", 0)

    def _told(self, kind: Any, message: Mapping[str, Any]) -> Command:
        return super()._told(kind, message) if kind == "left" else self.command()
