"""JSON in, with limits: no body whatever may cost a 500, or be kept that cannot be shown again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any

from rest_framework.parsers import BaseParser

from experiments.api.problems import FieldError, Problem
from spec.problems import name_of, pointer
from spec.text import clean_text

MAX_BODY_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_KEYS = 2_000
MAX_STRING = 16_000


class StrictJSONParser(BaseParser):
    """RFC 8259 and no more: no NaN, no key twice, no NUL, no half of a surrogate pair; bounded in size, depth and number of keys."""

    media_type = "application/json"

    def parse(self, stream: IO[bytes], media_type: str | None = None, parser_context: Mapping[str, Any] | None = None) -> Any:
        """The value in the body. Raises Problem (400 or 413)."""
        data = stream.read(MAX_BODY_BYTES + 1)
        if len(data) > MAX_BODY_BYTES:
            raise Problem("too-large", f"a body has at most {MAX_BODY_BYTES:,} bytes")
        return read_json(data)


def read_json(data: bytes) -> Any:
    """The JSON value in `data`. Raises Problem (400) with a pointer to what is wrong."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise _problem([], f"nested deeper than {MAX_DEPTH}") from None
    except UnicodeDecodeError as error:
        raise _problem([], f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise _problem([], f"not JSON: {str(error)[:200]}") from None
    _check(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double[:100]!a} appears twice")
    return found


def _check(value: Any) -> None:
    """Walks the value without recursion; the path of each node goes with it."""
    left: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    keys = 0
    while left:
        path, node = left.pop()
        if len(path) > MAX_DEPTH:
            raise _problem(path, f"nested deeper than {MAX_DEPTH}")
        if isinstance(node, dict):
            keys += len(node)
            if keys > MAX_KEYS:
                raise _problem([], f"more than {MAX_KEYS:,} keys")
            for key, child in node.items():
                _check_text(path, key)
                left.append(((*path, key), child))
        elif isinstance(node, list):
            left.extend(((*path, index), child) for index, child in enumerate(node))
        elif isinstance(node, str):
            _check_text(path, node)
        elif isinstance(node, float) and not math.isfinite(node):
            raise _problem(path, "is too large a number")


def _check_text(path: tuple[str | int, ...], text: str) -> None:
    if len(text) > MAX_STRING:
        raise _problem(path, f"a string has at most {MAX_STRING:,} characters")
    try:
        clean_text(text)
    except ValueError as error:
        raise _problem(path, str(error)) from None


def _problem(path: tuple[str | int, ...] | list[str | int], detail: str) -> Problem:
    where = pointer(*path).encode("utf-8", "backslashreplace").decode()
    if path:
        detail = f"{name_of(path)}: {detail}".encode("utf-8", "backslashreplace").decode()
    return Problem("malformed", detail, [FieldError(pointer=where, detail=detail)])
