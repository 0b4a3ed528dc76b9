"""Whether an attempt gets on: its spool grows. Tells a hang from a long step."""

from __future__ import annotations

from pathlib import Path

from spec import events, spool


class Progress:
    """Watches a spool by its size, and reads it until the first step. Times are of a monotonic clock, in seconds."""

    def __init__(self, path: Path, now: float, first_step_s: float, later_s: float) -> None:
        """A hang is `first_step_s` without a record before the first step, and after it `later_s` or ten times the longest wait so far."""
        self._path = path
        self._reader = spool.Reader(path)
        self._first_step_s, self._later_s = first_step_s, later_s
        self._size = 0
        self._last = now
        self._longest_s = 0.0
        self.started = False
        self.stepped = False

    def look(self, now: float) -> None:
        """Notes what has been written since the last look."""
        stepped_before = self.stepped
        if not self.stepped:
            self._read()
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size != self._size:
            if stepped_before:
                self._longest_s = max(self._longest_s, now - self._last)
            self._size, self._last = size, now

    def silent_too_long(self, now: float) -> float | None:
        """Seconds without a record, if they are too many."""
        limit_s = max(self._later_s, 10 * self._longest_s) if self.stepped else self._first_step_s
        silent_s = now - self._last
        return silent_s if silent_s > limit_s else None

    def _read(self) -> None:
        for _, payload in self._reader.read():
            event = events.decode(payload)
            self.started = self.started or isinstance(event, events.RunStarted)
            self.stepped = self.stepped or isinstance(event, events.StepDone)
        if self.stepped:
            self._reader.close()
