"""`{% vite "run" %}`: the tags of a page's script and styles, by the manifest that Vite wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from django import template
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.templatetags.static import static
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

register = template.Library()


@register.simple_tag
def vite(page: str) -> SafeString:
    """Style sheets and module of `frontend/src/page/<page>.ts`. Raises ImproperlyConfigured where the front end is not built."""
    manifest = _manifest()
    key = f"src/page/{page}.ts"
    if key not in manifest:
        raise ImproperlyConfigured(f"the front end has no page {page!r}: run `make` to build it")
    styles = dict.fromkeys(_styles(manifest, key, set()))
    links = format_html_join("\n", '<link rel="stylesheet" href="{}">', ((static(name),) for name in styles))
    return format_html('{}\n<script type="module" src="{}"></script>', links, static(manifest[key]["file"]))


def _styles(manifest: dict[str, Any], key: str, seen: set[str]) -> Iterator[str]:
    if key in seen:
        return
    seen.add(key)
    for imported in manifest[key].get("imports", []):
        yield from _styles(manifest, imported, seen)
    yield from manifest[key].get("css", [])


def _manifest() -> dict[str, Any]:
    path: Path = settings.VITE_MANIFEST
    try:
        return _read(path, path.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise ImproperlyConfigured(f"{path} is missing: build the front end with `make`") from error


@lru_cache(maxsize=2)
def _read(path: Path, written_ns: int) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))
