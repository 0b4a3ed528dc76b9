"""One ingest socket's conversation, without the socket: what to answer to each frame. All of it blocks; run it in a thread.

What was stored is told to viewers at most 20 times a second; a sender that catches up makes them fetch instead.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from experiments.actions.attempt import Command, IngestGrant, renew_lease
from experiments.actions.node import announce, hang, hosts_of
from experiments.actions.stored import Damaged, InStorage, record_damaged, record_stored
from experiments.ingest.text import TextTail
from experiments.live.publish import Message, publish
from experiments.models import LIVE, TERMINAL, Run
from experiments.models.telemetry import SpoolCursor
from experiments.telemetry import frame, log, write
from experiments.telemetry.batch import Steps, join
from experiments.telemetry.frame import FrameError
from experiments.telemetry.read import Facts, live_block
from experiments.telemetry.write import FencedError, OutOfOrderError, Stored
from spec.events import EventError

PUSH_INTERVAL_S = 0.045
RUN_INTERVAL_S = 0.5
CATCH_UP_STEPS = 256
"""A frame with more steps than this is history on its way in: viewers read it from the store."""

Answer = dict[str, Any]
_PLACE = re.compile(r"[0-9A-Za-z.:\[\]_-]{1,90}:[0-9]{1,5}")


@dataclass
class Session:
    """`next_seq` is, for each attempt, the number of the record that this socket sends next."""

    grant: IngestGrant
    next_seq: dict[int, int] = field(default_factory=dict)
    ended: bool = False
    _waiting: list[Stored] = field(default_factory=list)
    _pushed_at: float = 0.0
    _run_pushed_at: float = 0.0
    _command: Command | None = None
    _facts: Facts | None = None
    _text: TextTail = field(default_factory=TextTail)
    _in_storage: InStorage | None = None

    def hello(self) -> Answer:
        """Raises FencedError."""
        command = self.command()
        cursors = {c.attempt: c for c in SpoolCursor.objects.filter(run_id=self.grant.run_id)}
        attempts = {0} if self.grant.is_recorder else set(range(1, self.grant.attempt + 1))
        acked = {attempt: cursors[attempt].acked_seq if attempt in cursors else 0 for attempt in sorted(attempts | set(cursors))}
        self.next_seq = {attempt: seq + 1 for attempt, seq in acked.items()}
        mine = cursors.get(self.grant.attempt)
        self._command = command
        told = {"acked": {str(attempt): seq for attempt, seq in acked.items()}, "log_offset": mine.log_offset if mine else 0}
        return answer_of(command) | {"type": "hello", **told}

    def command(self) -> Command:
        """What the server wants now. Raises FencedError where this attempt counts no more."""
        names = ("attempt", "state", "recorded", "desired", "checkpoint_requests", "node_count")
        row = Run.objects.filter(pk=self.grant.run_id).values(*names).first()
        alive = row and row["attempt"] == self.grant.attempt and (row["state"] in LIVE or (row["recorded"] and row["state"] not in TERMINAL))
        if not row or not (alive or self.ended):
            raise FencedError
        hosts = hosts_of(self.grant.run_id, self.grant.attempt) if row["node_count"] > 1 else None
        return Command(row["desired"], row["checkpoint_requests"], hosts)

    def changed_command(self) -> Answer | None:
        """The command, if it is another one than the sender knows. Raises FencedError."""
        command = self.command()
        if command == self._command:
            return None
        self._command = command
        return answer_of(command)

    def text(self, message: str) -> Answer:
        """The answer to a text frame. Raises FrameError, FencedError."""
        try:
            told = json.loads(message)
            kind = told.get("type")
        except (ValueError, AttributeError, RecursionError) as error:
            raise FrameError("a text frame must be a JSON object") from error
        self._command = self._told(kind, told)
        return answer_of(self._command)

    def _told(self, kind: Any, message: Mapping[str, Any]) -> Command:
        """Takes a text frame in, and says what is wanted now. Raises FrameError, FencedError."""
        if kind == "rendezvous" and not self.grant.is_recorder:
            place = message.get("at")
            if not isinstance(place, str) or not _PLACE.fullmatch(place):
                raise FrameError("rendezvous.at must be an address, without a zone (%eth0), and a port: at most 96 characters")
            announce(self.grant.run_id, self.grant.attempt, place)
        elif kind in ("stored", "damaged") and not self.grant.is_recorder:
            self._hear_of_storage(kind, message)
        elif kind == "hanging" and not self.grant.is_recorder:
            hang(self.grant.run_id, self.grant.attempt)
        elif kind != "heartbeat":
            raise FrameError(f"unknown text frame {kind!r:.40}")
        command = self.command() if self.ended else renew_lease(self.grant.run_id, self.grant.attempt)
        if command is None:
            raise FencedError
        return command

    def _note_stored(self) -> None:
        if self._in_storage is not None:
            record_stored(self.grant.run_id, self.grant.attempt, self._in_storage)

    def _hear_of_storage(self, kind: str, message: Mapping[str, Any]) -> None:
        """What is stored is taken in again with later events: it may be said before the checkpoint itself has arrived, and the attempt may end
        with the frame that brings it. Raises FrameError.
        """
        try:
            if kind == "damaged":
                record_damaged(self.grant.run_id, self.grant.attempt, Damaged.model_validate(message))
            else:
                self._in_storage = InStorage.model_validate(message)
                self._note_stored()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise FrameError(f"{kind}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def binary(self, data: bytes) -> Answer:
        """Stores a binary frame and answers for it. Raises FrameError, FencedError."""
        if len(data) > frame.MAX_FRAME_BYTES:
            raise FrameError(f"frame of {len(data)} bytes; the limit is {frame.MAX_FRAME_BYTES}")
        try:
            if data[:1] == b"E":
                return self._events(data)
            if data[:1] == b"L":
                return self._log(data)
        except (OutOfOrderError, EventError) as error:
            raise FrameError(str(error)) from error
        raise FrameError(f"unknown frame {data[:1]!r}")

    def _events(self, data: bytes) -> Answer:
        attempt, payloads = frame.events_frame(data)
        if attempt not in self.next_seq:
            raise FrameError(f"attempt {attempt} is not one that this socket may send")
        first = self.next_seq[attempt]
        stored = write.ingest(self.grant.run_id, attempt, first, payloads, holder=self.grant.attempt, before_end=self._note_stored)
        self.next_seq[attempt] = first + len(payloads)
        self.ended |= stored.ended
        self._waiting.append(stored)
        if stored.events:
            self._facts = None
            self._note_stored()
        if self.push_due_s() <= 0 or stored.events or stored.rewound_to is not None:
            self.push()
        return {"type": "ack", "attempt": attempt, "seq": stored.acked_seq}

    def _log(self, data: bytes) -> Answer:
        offset, content = frame.log_frame(data)
        known, start, kept = log.append(self.grant.run_id, self.grant.attempt, offset, content, node=self.grant.node)
        if kept:
            at, text = self._text.add(start, kept)
            if text:
                publish(self.grant.run_id, [Message("log", json.dumps({"offset": at, "text": text}).encode())])
        return {"type": "log_ack", "offset": known}

    def push_due_s(self) -> float:
        """Seconds until what is waiting may be told to viewers; infinite when nothing is."""
        return self._pushed_at + PUSH_INTERVAL_S - time.monotonic() if self._waiting else float("inf")

    def push(self) -> None:
        """Tells viewers what has been stored since the last time."""
        waiting, self._waiting = self._waiting, []
        messages: list[Message] = []
        steps: list[tuple[int, Steps]] = []
        for stored in waiting:
            if stored.rewound_to is not None:
                messages += [*self._news(steps), Message("rewind", str(stored.rewound_to).encode())]
                steps = []
            steps += stored.steps
            messages += [Message("event", json.dumps(event).encode()) for event in stored.events]
        messages += self._news(steps)
        self._pushed_at = time.monotonic()
        if self._pushed_at - self._run_pushed_at > RUN_INTERVAL_S or any(stored.events for stored in waiting):
            messages.append(Message("run"))
            self._run_pushed_at = self._pushed_at
        publish(self.grant.run_id, messages)

    def _news(self, stored: list[tuple[int, Steps]]) -> list[Message]:
        """One block for steps that follow each other, one for each stretch that came late, or word that there is too much to push."""
        if not stored:
            return []
        if sum(len(steps) for _, steps in stored) > CATCH_UP_STEPS:
            return [Message("refetch", str(max(int(steps.step[-1]) for _, steps in stored)).encode())]
        facts = self._known(stored)
        late = [(before, steps) for before, steps in stored if steps.step[0] <= before]
        follow = [(before, steps) for before, steps in stored if steps.step[0] > before]
        messages = [Message("late", live_block(facts, before, steps)) for before, steps in late]
        for _, group in itertools.groupby(follow, key=lambda item: item[1].scalars.shape[1]):
            one = list(group)
            messages.append(Message("steps", live_block(facts, one[0][0], join([steps for _, steps in one]))))
        return messages

    def _known(self, stored: list[tuple[int, Steps]]) -> Facts:
        """The run's names and shape: as this socket knows them, unless an event or more names may have changed them."""
        width = max(steps.scalars.shape[1] for _, steps in stored)
        if self._facts is None or len(self._facts.names) < width:
            self._facts = Facts.fetch(self.grant.run_id)
        return self._facts


def answer_of(command: Command) -> Answer:
    """The text frame that tells `command`."""
    told: Answer = {"type": "command", "desired": command.desired, "checkpoint_requests": command.checkpoint_requests}
    if command.hosts is not None:
        lost = dict(zip(("reason", "detail"), command.hosts.lost, strict=True)) if command.hosts.lost else None
        told["hosts"] = {"rendezvous": command.hosts.rendezvous, "lost": lost, "hanging": command.hosts.hanging}
    return told
