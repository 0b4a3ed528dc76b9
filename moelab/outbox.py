"""What is still to be shipped of a run's spools: the older attempts' first, then the attempt's own as it grows."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from pathlib import Path

from spec import spool

FRAME_BYTES = 1_000_000
WINDOW_BYTES = 8_000_000
IN_FLIGHT = 2
_RECORD = struct.Struct("<II")


def frame(attempt: int, payloads: list[bytes]) -> bytes:
    """An `E` frame of the ingest socket: consecutive records of one attempt."""
    parts = [b"E", struct.pack("<I", attempt)]
    for payload in payloads:
        parts += [_RECORD.pack(len(payload), zlib.crc32(payload)), payload]
    return b"".join(parts)


class Outbox:
    """One attempt's spool on its way: records that were sent stay in memory until they are acknowledged, at most WINDOW_BYTES of them.

    A new connection sends again from memory; only a server that knows less than memory holds makes it read the file again.
    """

    def __init__(self, attempt: int, path: Path) -> None:
        self.attempt = attempt
        self._path = path
        self._reader = spool.Reader(path)
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._sent = 0
        self._at_end = False
        self._frame_ends: deque[int] = deque()
        self.acked = 0

    def begin(self, acked: int) -> None:
        """A connection begins; the server has everything up to `acked`."""
        first_held = self._unacked[0][0] if self._unacked else self._reader.seq + 1
        if acked < first_held - 1:  # a database that crashed has forgotten its newest commits
            self._reader.close()
            self._reader = spool.Reader(self._path, after_seq=acked)
            self._unacked.clear()
            self._bytes = 0
            self._at_end = False
        self.acked = self._sent = acked
        self._frame_ends.clear()
        self.acknowledge(acked)

    def acknowledge(self, seq: int) -> None:
        """The server has committed everything up to `seq`."""
        self.acked = max(self.acked, seq)
        while self._frame_ends and self._frame_ends[0] <= seq:
            self._frame_ends.popleft()
        while self._unacked and self._unacked[0][0] <= seq:
            self._bytes -= len(self._unacked.popleft()[1])

    def next_payloads(self) -> list[bytes]:
        """The next consecutive records to send, about FRAME_BYTES of them; empty when there is nothing new or too much is unacknowledged.

        A server that is slower than the run gets fewer and larger frames: what comes while IN_FLIGHT frames wait for their
        acknowledgement goes into the next one.
        """
        if len(self._frame_ends) >= IN_FLIGHT:
            return []
        if not self._unsent and not self.full:
            self._read_more()
        if not self._unsent:
            return []
        batch: list[bytes] = []
        size = 0
        for seq, payload in self._unacked:
            if seq <= self._sent:
                continue
            if batch and size + len(payload) > FRAME_BYTES:
                break
            batch.append(payload)
            size += len(payload)
            self._sent = seq
        self._frame_ends.append(self._sent)
        return batch

    @property
    def full(self) -> bool:
        """Whether as much is unacknowledged as memory may hold."""
        return self._bytes >= WINDOW_BYTES

    @property
    def _unsent(self) -> bool:
        return bool(self._unacked) and self._unacked[-1][0] > self._sent

    @property
    def sent(self) -> bool:
        """Whether all that the file held at the last look has been sent."""
        return self._at_end and not self._unsent

    @property
    def settled(self) -> bool:
        """Whether all that the file held at the last look has been acknowledged."""
        return self._at_end and not self._unacked

    def _read_more(self) -> None:
        records = self._reader.read(max_bytes=FRAME_BYTES)
        self._at_end = not records
        for seq, payload in records:
            if seq > self.acked:
                self._unacked.append((seq, payload))
                self._bytes += len(payload)

    def close(self) -> None:
        self._reader.close()


def outboxes(attempts_dir: Path, own: int) -> list[Outbox]:
    """One for each attempt up to `own` that has left a spool here, oldest first; `own` comes last, whether its spool exists yet or not."""
    found = sorted(int(path.parent.name) for path in attempts_dir.glob("*/events.spool") if path.parent.name.isdigit())
    numbers = [number for number in found if number < own] + [own]
    return [Outbox(number, attempts_dir / str(number) / "events.spool") for number in numbers]
