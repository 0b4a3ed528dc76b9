"""Which server to talk to: given, from the environment, or from the file that `moelab up` writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from moelab.home import home

DEFAULT_SERVER = "http://127.0.0.1:8000"


class Connection(NamedTuple):
    """A server's address, without a slash at the end, and a token for it ("" where there is none)."""

    server: str
    token: str


def client_file() -> Path:
    """The file in which a local server leaves its address and a token for this user."""
    return home() / "client.json"


def find_server(server: str | None = None, token: str | None = None) -> Connection:
    """The first of: what is given; MOELAB_SERVER and MOELAB_TOKEN; client.json; the default address.

    The file's token goes to the file's server alone: another address never gets it.
    """
    server = server or os.environ.get("MOELAB_SERVER")
    token = token or os.environ.get("MOELAB_TOKEN")
    written = _written()
    if server is None:
        server = written.get("server", DEFAULT_SERVER)
    if token is None and server.rstrip("/") == written.get("server", "").rstrip("/"):
        token = written.get("token")
    return Connection(server.rstrip("/"), token or "")


def _written() -> dict[str, str]:
    try:
        found = json.loads(client_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
