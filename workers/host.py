"""Which attempts live on this host. An attempt lives as long as somebody holds the lock on its `attempt.lock`:
its supervisor, or a rank, which inherits the lock, so that a free lock means that no process of the attempt is left.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil


class LockedError(Exception):
    """Another process holds the attempt."""


@dataclass
class Holder:
    """What stands in a held lock: the attempt, its devices while its ranks run, and its processes as [pid, start time]."""

    run: int
    attempt: int
    supervisor: tuple[int, float]
    devices: list[str] = field(default_factory=list)
    ranks: list[tuple[int, float]] = field(default_factory=list)

    def processes(self) -> Iterator[psutil.Process]:
        """Those of its processes that still exist; a reused process id is not taken for one."""
        for pid, started in (self.supervisor, *self.ranks):
            try:
                process = psutil.Process(pid)
                if abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue


class AttemptLock:
    """The lock of one attempt, held until this process and all that inherited `fd` are gone."""

    def __init__(self, attempt_dir: Path) -> None:
        """Takes the lock. Raises LockedError if the attempt has it already."""
        attempt_dir.mkdir(parents=True, exist_ok=True)
        self.path = attempt_dir / "attempt.lock"
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for last_try in (False, False, True):
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # Somebody who only looks whether it is held lets go at once.
                if last_try:
                    os.close(self.fd)
                    raise LockedError(f"{self.path} is held") from None
                time.sleep(0.1)

    def write(self, holder: Holder) -> None:
        """Says who holds it."""
        text = json.dumps(asdict(holder)).encode()
        os.pwrite(self.fd, text, 0)
        os.ftruncate(self.fd, len(text))


def identity(pid: int) -> tuple[int, float]:
    """A process id and the start time that tells it from a later process of the same id. Raises psutil.Error."""
    return pid, psutil.Process(pid).create_time()


def read(lock: Path) -> Holder | None:
    """Who holds the lock at `lock`; None if nobody does. Devices are unknown, hence empty, in the instant after it was taken."""
    try:
        fd = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(fd, 1_000_000, 0)
    finally:
        os.close(fd)
    try:
        found = json.loads(text)
        return Holder(**found | {"supervisor": tuple(found["supervisor"]), "ranks": [tuple(rank) for rank in found["ranks"]]})
    except (ValueError, KeyError, TypeError):
        run, attempt = int(lock.parents[2].name), int(lock.parent.name)
        return Holder(run=run, attempt=attempt, supervisor=(0, 0.0))


def put_aside(run_dir: Path, attempt: int) -> None:
    """Renames `run_dir` if it is another run's: the server hands out an attempt once, so whatever has its name was made for a
    server or a database that numbered its runs anew. Its checkpoints and records must not pass for this run's.
    """
    foreign = (run_dir / "attempts" / str(attempt)).exists() or (attempt == 1 and (run_dir / "checkpoints").exists())
    if foreign and not any(read(lock) for lock in run_dir.glob("attempts/*/attempt.lock")):
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.before-{time.time_ns()}"))


def living(home: Path) -> list[Holder]:
    """The attempts that live on this host under `home`."""
    found = (read(lock) for lock in sorted(home.glob("runs/*/attempts/*/attempt.lock")))
    return [holder for holder in found if holder is not None]


def running_supervisors(home: Path) -> list[int]:
    """Process ids of the supervisors that live under `home`."""
    pids = []
    for holder in living(home):
        pids += [process.pid for process in holder.processes() if process.pid == holder.supervisor[0]]
    return pids


def end_attempt(lock: Path, timeout_s: float = 20.0) -> bool:
    """Kills whatever holds `lock`, an attempt that a later one has replaced. True once nobody holds it."""
    deadline = time.monotonic() + timeout_s
    while (holder := read(lock)) is not None:
        for process in holder.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
