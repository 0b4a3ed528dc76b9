"""Where moelab keeps its files on this host: `MOELAB_HOME`, or `var/` of the project."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The absolute path of moelab's directory; it need not exist yet."""
    chosen = os.environ.get("MOELAB_HOME")
    return Path(chosen).expanduser().absolute() if chosen else Path(__file__).absolute().parent.parent / "var"


def runs_dir() -> Path:
    """The directory that holds one directory for each run (docs/protocol.md, section 1)."""
    return home() / "runs"
