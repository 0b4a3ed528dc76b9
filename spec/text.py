"""Text that is safe to store and to show: NFC, no control characters, no lone surrogates, bounded."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, StringConstraints


def clean_text(value: str) -> str:
    """`value` in Unicode NFC. Raises ValueError for NUL, other control characters (tab and newline pass) and lone surrogates."""
    for char in value:
        category = unicodedata.category(char)
        if category == "Cs" or (category == "Cc" and char not in "\t\n\r"):
            raise ValueError(f"contains the character U+{ord(char):04X}, which cannot be stored")
    return unicodedata.normalize("NFC", value)


def storable_text(value: object) -> object:
    """`value`, if it is text, with what a database cannot hold (NUL, other control characters, lone surrogates) replaced by U+FFFD."""
    if not isinstance(value, str) or value.isprintable():
        return value
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r" else char for char in value)


def clean_name(value: str) -> str:
    """`value` as one clean line without outer white space. Raises ValueError if it spans lines or is empty."""
    name = clean_text(value).strip()
    if not name or any(char in name for char in "\t\n\r"):
        raise ValueError("must be one line that is not empty")
    return name


Text = Annotated[str, StringConstraints(max_length=16_000), AfterValidator(clean_text)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(clean_name)]
# What a program says (an error, a log): never refused for its characters.
Storable = Annotated[str, BeforeValidator(storable_text)]
