"""One worker for each MOELAB_HOME: what lies there is one host's, and two workers would take each other's runs for their own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HomeInUseError(Exception):
    """Another worker lives in this home; the message says which."""


@contextmanager
def sole_worker(home: Path) -> Iterator[None]:
    """Holds `home` for this process. Raises HomeInUseError, OSError.

    The lock is the process's own (POSIX): children do not inherit it, so that one that outlives a killed worker keeps no new one out.
    """
    home.mkdir(parents=True, exist_ok=True)
    fd = os.open(home / "worker.pid", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            who = os.pread(fd, 20, 0).decode(errors="replace")
            raise HomeInUseError(f"a worker (process {who}) lives in {home} already: set MOELAB_HOME to another directory for this one") from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)
