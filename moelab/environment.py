"""The variables that configure moelab, read once and typed; for the server, the command line and the workers alike.

What `moelab up` finds out while it runs (the addresses of its embedded servers) stands in `$MOELAB_HOME/environment.json`,
so that `manage.py` and `moelab` commands typed in another terminal reach the same servers. The real environment wins.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from moelab.home import home

__all__ = ["PROJECT", "environment_file", "flag", "home", "listed", "number", "secret_key", "text", "write_private"]

PROJECT = Path(__file__).resolve().parent.parent


def environment_file() -> Path:
    return home() / "environment.json"


def _remembered() -> dict[str, str]:
    try:
        return dict(json.loads(environment_file().read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def text(name: str, default: str = "") -> str:
    """The variable as text."""
    return os.environ.get(name) or _remembered().get(name) or default


def flag(name: str, default: bool = False) -> bool:
    """The variable as yes or no. Raises ValueError for anything else."""
    value = text(name, str(default)).lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off", ""):
        return False
    raise ValueError(f"{name}={value!r} is neither yes nor no")


def number(name: str, default: float) -> float:
    """The variable as a number. Raises ValueError."""
    value = text(name, str(default))
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is not a number") from error


def listed(name: str, default: str = "") -> list[str]:
    """The variable as a list, split at commas."""
    return [part.strip() for part in text(name, default).split(",") if part.strip()]


def write_private(path: Path, content: str) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.touch(mode=0o600)
    scratch.write_text(content)
    scratch.replace(path)


def secret_key() -> str:
    """MOELAB_SECRET_KEY, or a random one kept in MOELAB_HOME. Raises ValueError for one that is too short to be a secret."""
    if given := text("MOELAB_SECRET_KEY"):
        if len(given) < 32:
            raise ValueError("MOELAB_SECRET_KEY has fewer than 32 characters")
        return given
    path = home() / "secret_key"
    if not path.exists():
        write_private(path, secrets.token_urlsafe(48))
    return path.read_text()
