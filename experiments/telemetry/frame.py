"""The binary frames of the ingest socket (docs/protocol.md section 4), taken apart and checked."""

from __future__ import annotations

import struct
import zlib

MAX_FRAME_BYTES = 4_000_000
_RECORD = struct.Struct("<II")


class FrameError(ValueError):
    """The frame is malformed; nothing of it may be kept."""


def events_frame(frame: bytes) -> tuple[int, list[memoryview]]:
    """Attempt and records' payloads of an `E` frame. Raises FrameError for a torn or damaged one."""
    view = memoryview(frame)
    if len(view) < 5:
        raise FrameError("an E frame has at least 5 bytes")
    attempt = int.from_bytes(view[1:5], "little")
    if attempt > 2**31 - 1:
        raise FrameError(f"attempt {attempt} is out of range")
    payloads, offset = [], 5
    while offset < len(view):
        if offset + _RECORD.size > len(view):
            raise FrameError(f"torn record at byte {offset}")
        length, crc = _RECORD.unpack_from(view, offset)
        offset += _RECORD.size
        payload = view[offset : offset + length]
        if len(payload) < length:
            raise FrameError(f"record at byte {offset} claims {length} bytes and has {len(payload)}")
        if zlib.crc32(payload) != crc:
            raise FrameError(f"record at byte {offset}: wrong checksum")
        payloads.append(payload)
        offset += length
    return attempt, payloads


def log_frame(frame: bytes) -> tuple[int, bytes]:
    """Offset and bytes of an `L` frame. Raises FrameError."""
    if len(frame) < 9:
        raise FrameError("an L frame has at least 9 bytes")
    offset = int.from_bytes(frame[1:9], "little")
    if offset >= 2**62:
        raise FrameError(f"log offset {offset} is out of range")
    return offset, frame[9:]
