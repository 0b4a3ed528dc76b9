"""Checkpoints on this host's disk, as the trainer publishes them: one that has its name is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from workers.manifest import MANIFEST

_SYNC_BYTES = 128 * 1024 * 1024
_STEP = re.compile(r"step-([0-9]{8,10})")


def write(path: Path, chunks: Iterator[bytes]) -> None:
    """Through to the disk. Syncs now and then: with all of a large file to write at its end, nothing would seem to move for minutes."""
    unsynced = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            unsynced += len(chunk)
            if unsynced >= _SYNC_BYTES:
                os.fdatasync(file.fileno())
                unsynced = 0
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """What was made or renamed in it stays so after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def half_fetched(checkpoints: Path, place: str, pid: int) -> Path:
    """Where the process `pid` gathers a checkpoint that is to lie in the directory. The trainer sweeps away those of the dead."""
    return checkpoints / f"{place.rpartition('/')[2]}.{pid}.tmp"


def published(checkpoints: Path) -> set[int]:
    """The steps of the checkpoints in a directory: one that has its name is whole."""
    if not checkpoints.is_dir():
        return set()
    return {int(match[1]) for path in checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))}


def manifests(checkpoints: Path) -> Mapping[int, str]:
    """The SHA-256 of the manifest of each checkpoint in a directory."""
    found = {}
    for step in published(checkpoints):
        with contextlib.suppress(OSError):  # removed meanwhile
            found[step] = hashlib.sha256((checkpoints / f"step-{step:08d}" / MANIFEST).read_bytes()).hexdigest()
    return found
