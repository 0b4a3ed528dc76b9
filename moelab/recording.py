"""A recording on disk: what an outside trainer says, until the server has all of it.

$MOELAB_HOME/recordings/<id>/recording.json   name and project, and the run's number once the server has given one
                             events.spool     spec.spool
                             lock             held by the process that records
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from moelab.client import ApiError, Client
from moelab.connection import find_server
from moelab.home import home
from moelab.outbox import Outbox
from moelab.shipper import Denied, Fenced, Shipper
from spec import events, spool


class Facts(BaseModel):
    """What recording.json says."""

    model_config = ConfigDict(extra="forbid")

    name: str
    project: str | None = None
    tags: list[str] = []
    notes: str | None = None
    run: int | None = None


class InUseError(RuntimeError):
    """Another process records or ships this recording."""


class Recording:
    """One recording, held by this process."""

    def __init__(self, directory: Path, facts: Facts) -> None:
        """Makes or opens `directory` and takes its lock. Raises InUseError, OSError."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory, self.facts = directory, facts
        self.spool_path = directory / "events.spool"
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise InUseError(f"{directory} is in use") from None

    @classmethod
    def create(cls, facts: Facts) -> Recording:
        """A new one in MOELAB_HOME."""
        made = cls(home() / "recordings" / uuid.uuid4().hex, facts)
        made.save()
        return made

    @classmethod
    def open(cls, directory: Path) -> Recording:
        """One that lies there. Raises InUseError, OSError, ValueError."""
        return cls(directory, Facts.model_validate_json((directory / "recording.json").read_text()))

    def save(self) -> None:
        """Writes recording.json."""
        partial = self.directory / ".recording.json"
        partial.write_text(self.facts.model_dump_json())
        partial.replace(self.directory / "recording.json")

    def begin_run(self, client: Client) -> int:
        """The run's number; asks the server for one the first time. Raises ApiError, ServerUnreachable."""
        if self.facts.run is None:
            made = client.record(self.facts.name, project=self.facts.project, tags=self.facts.tags, notes=self.facts.notes)
            self.facts.run = int(made["id"])
            self.save()
        return self.facts.run

    def shipper(self, server: str | None, token: str | None) -> Shipper:
        """Ships the spool of the run, whose number is known."""

        def url() -> str:
            found = urlsplit(find_server(server, token).server)
            return f"{'wss' if found.scheme == 'https' else 'ws'}://{found.netloc}/ws/ingest/{self.facts.run}/?attempt=0"

        return Shipper(url, find_server(server, token).token, [Outbox(0, self.spool_path)])

    def discard(self) -> None:
        """Deletes it, once the server has everything."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def leftovers() -> list[Recording]:
    """Recordings that no process holds."""
    found = []
    for path in sorted((home() / "recordings").glob("*/recording.json"), key=lambda path: path.stat().st_mtime):
        try:
            found.append(Recording.open(path.parent))
        except (InUseError, OSError, ValueError):
            continue
    return found


def sync(recording: Recording, server: str | None, token: str | None, timeout_s: float) -> bool:
    """Ships a recording whose process has ended, and deletes it. True if the server has everything. Raises ApiError, ServerUnreachable."""
    with Client(server, token) as client:
        recording.begin_run(client)
    last = _end(recording)
    shipper = recording.shipper(server, token)
    shipper.finish(last)
    try:
        asyncio.run(asyncio.wait_for(shipper.run(), timeout_s))
    except TimeoutError:
        recording.close()
        return False
    except Denied as error:  # nothing has arrived: the recording stays
        recording.close()
        raise ApiError(403, "Forbidden", f"run {recording.facts.run}: {error}; it takes a token with the scope `ingest`") from None
    except Fenced:  # the run was ended from elsewhere; the server takes no more of it
        pass
    recording.discard()
    return True


def _end(recording: Recording) -> int:
    """The number of the spool's last record, which is RunEnded: written here where the process did not come to it."""
    ended = False
    with spool.Reader(recording.spool_path) as reader:
        while records := reader.read():
            ended = isinstance(events.decode(records[-1][1]), events.RunEnded)
    with spool.Writer(recording.spool_path) as writer:
        if not ended:
            text = "the process that recorded it ended without a word"
            writer.append(events.encode(events.RunEnded(at=time.time(), outcome="failed", reason="recorder_lost", detail=text)))
        return writer.last_seq
