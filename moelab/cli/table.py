"""Plain tables and durations for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> str:
    """Lines with aligned columns; the titles in `right` name columns that are aligned to the right. Empty cells show as -."""
    cells = [list(titles), *([show(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    flush = [title in set(right) for title in titles]
    lines = [
        "  ".join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(row, widths, flush, strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def show(value: object) -> str:
    """A cell: figures short, nothing as -, control characters as spaces."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def age(moment: str | None, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 time was: 12s, 5m, 3h, 2d."""
    if not moment:
        return "-"
    return duration(((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds())


def duration(seconds: float | None) -> str:
    """Seconds as one short word."""
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)
    for unit, size, limit in (("s", 1, 120), ("m", 60, 7200), ("h", 3600, 172_800)):
        if seconds < limit:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86_400:.0f}d"


def count(number: int | None) -> str:
    """A large count short: 1.23B, 45.6M."""
    if not number:
        return "-"
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
