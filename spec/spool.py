"""The append-only file that a run's events are written to and shipped from.

    file     magic b"MLSPOOL1", then records
    record   uint32 length, uint32 CRC-32 of the payload, payload       (little-endian)

A record's sequence number is its place in the file, from 1. A kill at any byte leaves at most one torn record at the
end; the next Writer cuts it off, a Reader stops before it. Nothing is ever changed in place.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

MAGIC = b"MLSPOOL1"
MAX_RECORD_BYTES = 64 * 1024 * 1024
_RECORD = struct.Struct("<II")


class SpoolError(ValueError):
    """The file is not a spool, or the record is empty or larger than MAX_RECORD_BYTES."""


def _records(file_descriptor: int, offset: int) -> Iterator[tuple[int, bytes]]:
    """(offset after the record, payload) of each whole record from `offset` on; stops before a torn one."""
    while True:
        prefix = os.pread(file_descriptor, _RECORD.size, offset)
        if len(prefix) < _RECORD.size:
            return
        length, crc = _RECORD.unpack(prefix)
        if not 0 < length <= MAX_RECORD_BYTES:  # 0: what a crash of the machine leaves of a file's last blocks
            return
        payload = os.pread(file_descriptor, length, offset + _RECORD.size)
        if len(payload) < length or zlib.crc32(payload) != crc:
            return
        offset += _RECORD.size + length
        yield offset, payload


class Writer:
    """Appends records. One writer at a time: the trainer's rank 0 while it lives, then its supervisor."""

    def __init__(self, path: Path) -> None:
        """Opens or creates `path`, and cuts off a torn tail. Raises SpoolError if it is another kind of file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.last_seq = 0
        head = os.pread(self._fd, len(MAGIC), 0)
        if not MAGIC.startswith(head):
            os.close(self._fd)
            raise SpoolError(f"{path} is not a spool")
        end = len(MAGIC)
        if len(head) < len(MAGIC):
            os.pwrite(self._fd, MAGIC, 0)
        for after, _ in _records(self._fd, end):
            self.last_seq += 1
            end = after
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)

    def append(self, payload: bytes) -> int:
        """Writes one record and returns its sequence number. Raises OSError where the disk is full; the tail is then whole."""
        if not 0 < len(payload) <= MAX_RECORD_BYTES:
            raise SpoolError(f"record of {len(payload)} bytes is not within 1 and {MAX_RECORD_BYTES}")
        record = _RECORD.pack(len(payload), zlib.crc32(payload)) + payload
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        written = 0
        try:
            while written < len(record):
                written += os.write(self._fd, memoryview(record)[written:])
        except OSError:
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)
            raise
        self.last_seq += 1
        return self.last_seq

    def sync(self) -> None:
        """Forces what was appended to the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Reader:
    """Follows a spool that is being written. `path` need not exist yet."""

    def __init__(self, path: Path, after_seq: int = 0) -> None:
        """Will yield the records after `after_seq`."""
        self._path = path
        self._fd = -1
        self._offset = len(MAGIC)
        self._after = after_seq
        self.seq = 0

    def read(self, max_records: int = 1000, max_bytes: int = 4_000_000) -> list[tuple[int, bytes]]:
        """The next whole records as (sequence number, payload); empty when there is nothing new. Raises SpoolError for another kind of file."""
        if self._fd < 0 and not self._open():
            return []
        batch: list[tuple[int, bytes]] = []
        size = 0
        for offset, payload in _records(self._fd, self._offset):
            self._offset = offset
            self.seq += 1
            if self.seq <= self._after:
                continue
            batch.append((self.seq, payload))
            size += len(payload)
            if len(batch) >= max_records or size >= max_bytes:
                break
        return batch

    def _open(self) -> bool:
        try:
            self._fd = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        head = os.pread(self._fd, len(MAGIC), 0)
        if len(head) < len(MAGIC) or head != MAGIC:
            os.close(self._fd)
            self._fd = -1
            if not MAGIC.startswith(head):
                raise SpoolError(f"{self._path} is not a spool")
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
