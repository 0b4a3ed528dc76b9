"""Server-sent events, read from the lines of a response (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Message(NamedTuple):
    """One event: its type ("message" unless named), the id it carries ("" for none), and its data lines joined."""

    event: str
    id: str
    data: str


def messages(lines: Iterable[str]) -> Iterator[Message]:
    """The messages in `lines`, which come without their line ends. A message without its closing empty line is dropped."""
    event, identity = "message", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data or identity or event != "message":
                yield Message(event, identity, "\n".join(data))
            event, identity, data = "message", "", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "id":
            identity = value
        elif name == "event":
            event = value
