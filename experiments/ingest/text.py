"""A log that arrives in pieces, as text that never ends in half a character."""

from __future__ import annotations

import codecs


class TextTail:
    """Turns consecutive bytes into text; an unfinished character waits for the next piece."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = 0

    def add(self, offset: int, data: bytes) -> tuple[int, str]:
        """(byte offset of the text, text) of what `data`, which lies at `offset`, completes."""
        if offset != self._next:
            self._decoder.reset()
        start = offset - len(self._decoder.getstate()[0])
        text = self._decoder.decode(data)
        self._next = offset + len(data)
        return start, text
