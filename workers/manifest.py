"""The manifest of a checkpoint: the files that it has, with their sizes and SHA-256."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NotWhole(Exception):  # noqa: N818
    """The storage answers, and the checkpoint is not there or is not what its manifest says."""


class Item(NamedTuple):
    """A file as a manifest lists it."""

    size: int
    sha256: str


def listed(manifest: bytes, step: int) -> dict[str, Item]:
    """The files of a manifest. Raises NotWhole unless it is one of this step, and names files that can lie in one directory only."""
    try:
        told = json.loads(manifest)
        items = {name: Item(item["size"], item["sha256"]) for name, item in told["files"].items()}
        right = told["step"] == step and items
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotWhole(f"the manifest cannot be read: {type(error).__name__}") from error
    for name, item in items.items():
        proper = _NAME.fullmatch(name) and name != MANIFEST and isinstance(item.sha256, str) and _SHA256.fullmatch(item.sha256)
        if not proper or type(item.size) is not int or item.size < 0:
            raise NotWhole(f"the manifest lists {name!r:.120}, which no checkpoint has")
    if not right:
        raise NotWhole("the manifest is of another step")
    return items
