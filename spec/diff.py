"""What two specs differ in, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted path, value in `a`, value in `b`) where plain data differ, in the order of `a`; None stands for absent."""
    return list(_between(a, b, ""))


def _between(a: Any, b: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys: list[Any] = [*a, *(key for key in b if key not in a)]
        pairs = [(str(key), a.get(key), b.get(key)) for key in keys]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b and isinstance(a, bool) == isinstance(b, bool) else [(path, a, b)]
    return [found for key, left, right in pairs for found in _between(left, right, f"{path}.{key}" if path else key)]
