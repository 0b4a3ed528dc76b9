"""The log of an attempt: what its ranks print, made safe to show, in one file."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
from pathlib import Path

from workers.verdict import says_peer_gone

LIMIT_BYTES = 64 * 1024 * 1024
_TAIL_CHARS, _STACKS_CHARS = 8_000, 32_000
# Control characters but tab and newline, and those that reorder text: they can rewrite what a terminal or page shows.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LINE_END = re.compile("\r\n?")


class RunLog:
    """Appends to `path`. Output past LIMIT_BYTES, or that the disk does not take, is dropped; the tail stays in memory."""

    def __init__(self, path: Path, n_ranks: int = 1, *, first_rank: int = 0, alone: bool = True) -> None:
        """The log of ranks `first_rank` … on this host; `alone` where the run has no others elsewhere."""
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._several = n_ranks > 1 or not alone
        ranks = range(first_rank, first_rank + n_ranks)
        self._decoders = {rank: codecs.getincrementaldecoder("utf-8")("backslashreplace") for rank in ranks}
        self._open_line: dict[int, str] = {}
        self._full = False
        self._tail_chars = _TAIL_CHARS
        self.size = os.fstat(self._fd).st_size
        self.tail = ""
        self.last_words: dict[int, str] = {}
        """By rank, the first line by which it said that another rank is gone."""

    def feed(self, rank: int, data: bytes, *, last: bool = False) -> None:
        """What one rank printed; with several ranks each line is told whose it is, and is written once it is whole."""
        text = _LINE_END.sub("\n", self._decoders[rank].decode(data, last))
        if self._several:
            text = self._open_line.pop(rank, "") + text
            *lines, rest = text.split("\n")
            if rest and (last or len(rest) > 10_000):
                lines, rest = [*lines, rest], ""
            self._open_line[rank] = rest
            if rank not in self.last_words and (words := next(filter(says_peer_gone, lines), None)) is not None:
                self.last_words[rank] = safe(words)
            text = "".join(f"[{rank}] {line}\n" for line in lines)
        self._write(safe(text))

    def say(self, line: str) -> None:
        """A line of the supervisor's own."""
        start = "" if self.tail.endswith("\n") or not self.tail else "\n"
        self._write(f"{start}moelab: {safe(line)}\n")

    def make_room(self) -> None:
        """From now on the tail holds the stacks of several ranks."""
        self._tail_chars = _STACKS_CHARS

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return next((line.strip() for line in reversed(self.tail.splitlines()) if line.strip()), "")

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, text: str) -> None:
        if not text:
            return
        self.tail = (self.tail + text)[-self._tail_chars :]
        if self._full:
            return
        data = text.encode(errors="backslashreplace")
        if self.size + len(data) > LIMIT_BYTES:
            self._full = True
            data = f"\nmoelab: the log has reached {LIMIT_BYTES // 2**20} MiB; what follows is not kept\n".encode()
        with contextlib.suppress(OSError):
            self.size += os.write(self._fd, data)


def safe(text: str) -> str:
    """`text` with control characters written out, as in \\x1b."""
    return _UNSAFE.sub(lambda found: repr(found.group())[1:-1], text)
