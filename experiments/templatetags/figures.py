"""Numbers and times as people read them, in templates; frontend/src/data/format.ts says the same in the browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString

register = template.Library()

_SI = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
SPARK_WIDTH, SPARK_HEIGHT = 110, 26


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _three(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


@register.filter
def si(value: Any) -> str:
    """1234567 → 1.23M."""
    number = _number(value)
    if number is None:
        return "–"
    for unit, letter in _SI:
        if abs(number) >= unit * 0.9995:
            return _three(number / unit) + letter
    return _three(number)


@register.filter
def whole(value: Any) -> str:
    """1234567 → 1,234,567."""
    number = _number(value)
    return "–" if number is None else f"{number:,.0f}"


@register.filter
def metric(value: Any) -> str:
    """Four significant digits."""
    number = _number(value)
    if number is None:
        return "–"
    if number == 0:
        return "0"
    return f"{number:.2e}" if abs(number) < 1e-3 or abs(number) >= 1e6 else f"{number:.4g}"


@register.filter
def size(value: Any) -> str:
    """Bytes: 1234567 → 1.23 MB."""
    number = _number(value)
    if number is None:
        return "–"
    place = 0
    while number >= 1000 and place < len(_BYTES) - 1:
        number /= 1000
        place += 1
    return f"{_three(number)} {_BYTES[place]}"


@register.filter
def share(value: Any) -> str:
    """0.1234 → 12.3 %."""
    number = _number(value)
    return "–" if number is None else f"{number * 100:.3g} %"


@register.filter
def words(value: Any) -> str:
    """worker_lost → worker lost."""
    return str(value).replace("_", " ")


@register.filter
def get(mapping: Any, key: str) -> Any:
    """`mapping[key]`, or nothing."""
    return mapping.get(key) if hasattr(mapping, "get") else None


@register.simple_tag
def ago(time: datetime | str | None) -> SafeString | str:
    """A <time> that the browser words as an age."""
    if not time:
        return "–"
    stamp = time if isinstance(time, str) else time.isoformat()
    return format_html('<time datetime="{}" data-age>{}</time>', stamp, stamp[:16].replace("T", " "))


@register.simple_tag
def spark(values: Sequence[float] | None) -> SafeString:
    """The losses as a small line; the values stay readable in `data-values` for the live page."""
    kept = [value for value in values or [] if math.isfinite(value)]
    if len(kept) < 2:
        return format_html('<svg class="spark none" viewBox="0 0 {} {}" aria-hidden="true"></svg>', SPARK_WIDTH, SPARK_HEIGHT)
    low, high = min(kept), max(kept)
    across = SPARK_WIDTH / (len(kept) - 1)
    up = (SPARK_HEIGHT - 4) / ((high - low) or 1)
    points = " ".join(f"{i * across:.1f},{SPARK_HEIGHT - 2 - (value - low) * up:.1f}" for i, value in enumerate(kept))
    return format_html(
        '<svg class="spark" viewBox="0 0 {} {}" role="img" aria-label="Loss from {} to {}" preserveAspectRatio="none" data-values="{}">'
        '<polyline points="{}"/></svg>',
        SPARK_WIDTH,
        SPARK_HEIGHT,
        metric(kept[0]),
        metric(kept[-1]),
        " ".join(f"{value:.5g}" for value in kept),
        points,
    )


@register.simple_tag(takes_context=True)
def theme(context: template.Context) -> SafeString | str:
    """The `data-theme` that the reader has chosen, if any."""
    request = context.get("request")
    chosen = request.COOKIES.get("theme") if request else None
    return format_html(' data-theme="{}"', chosen) if chosen in ("dark", "light") else ""


@register.simple_tag(takes_context=True)
def current(context: template.Context, prefix: str) -> SafeString | str:
    """`aria-current` for the navigation's link that leads here."""
    request = context.get("request")
    path = request.path if request else ""
    here = path == prefix or (prefix != "/runs/new" and path.startswith(prefix + "/") and path != "/runs/new")
    return SafeString(' aria-current="page"') if here else ""
