"""A process that outlives the one that started it."""

from __future__ import annotations

import logging
import os
from pathlib import Path


def detach(log: Path) -> None:
    """Away from the caller's session and streams; from here on this process writes to `log`."""
    os.setsid()
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        target = os.open(os.devnull if fd == 0 else log, flags | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, fd)
        os.close(target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
