"""Where rank 0 writes what happens: the spool that is shipped, and the lines on the terminal."""

from __future__ import annotations

import time
from pathlib import Path

from spec import events, spool

LINE_EVERY_S = 1.0


class Journal:
    """Events go to the attempt's spool; a progress line to the terminal at most once a second. Silent on other ranks."""

    def __init__(self, directory: Path, *, first_rank: bool) -> None:
        """Opens `directory`/events.spool on the first rank."""
        self._writer = spool.Writer(directory / "events.spool") if first_rank else None
        self._last_line = 0.0

    def record(self, event: events.Event) -> None:
        """Appends an event. Raises OSError where the disk is full."""
        if self._writer:
            self._writer.append(events.encode(event))

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self._writer:
            print(text, flush=True)

    def progress(self, text: str, *, always: bool) -> None:
        """A line that may be left out where the last one is less than a second old."""
        now = time.monotonic()
        if always or now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            self.say(text)

    def sync(self) -> None:
        """Forces the events to the disk: a checkpoint must not be newer than what is known of the steps before it."""
        if self._writer:
            self._writer.sync()

    def close(self) -> None:
        if self._writer:
            self._writer.sync()
            self._writer.close()
            self._writer = None


def duration(seconds: float) -> str:
    """75 s as 1:15, and 3,700 s as 1:01:40."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
