"""The trainer's processes: one for each rank, none of which outlives its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from workers.devices import for_torch
from workers.linux import die_with_parent
from workers.meeting import Meeting
from workers.runlog import RunLog
from workers.verdict import Exit

# What only servers and workers need to know stays with them.
SECRETS = ("MOELAB_TOKEN", "MOELAB_SECRET_KEY", "DATABASE_URL", "REDIS_URL")
ORIGIN = "origin"
"""In a run's directory: another run's checkpoint that it begins with, where it had to be fetched."""
_PIPE_BYTES = 65_536


class Ranks:
    """The ranks of one attempt. `exits` lists those that have ended, in the order of their ends."""

    def __init__(self, log: RunLog, first_rank: int = 0) -> None:
        """`first_rank` is the first one's number, where hosts before this one have ranks of the run too."""
        self._log, self._first_rank = log, first_rank
        self._processes: list[subprocess.Popen[bytes]] = []
        self._killed: set[int] = set()
        self.exits: list[Exit] = []

    def start(self, run_dir: Path, attempt: int, devices: Sequence[str], threads: int, lock_fd: int, meeting: Meeting | None = None) -> None:
        """Starts one rank for each device; each holds the attempt's lock as well. Call it from the main thread. Raises OSError.

        Without a `meeting` these are all the run's ranks, and they meet through a file.
        """
        attempt_dir = run_dir / "attempts" / str(attempt)
        trainer = os.environ.get("MOELAB_TRAINER", "moe.train")
        argv = [sys.executable, "-u", "-m", trainer, str(run_dir / "spec.json"), "--out", str(run_dir), "--attempt", str(attempt)]
        shared = {name: value for name, value in os.environ.items() if name not in SECRETS} | {
            "WORLD_SIZE": str(len(devices) * (meeting.nodes if meeting else 1)),
            "LOCAL_WORLD_SIZE": str(len(devices)),
            "MOELAB_THREADS": str(threads),
            "MOELAB_ORIGIN": str(run_dir / ORIGIN / "checkpoints"),
            **(meeting.environment() if meeting else {"MOELAB_RENDEZVOUS": str(attempt_dir / "rendezvous")}),
        }
        for index, device in enumerate(devices):
            rank = self._first_rank + index
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(index), "MOELAB_DEVICE": for_torch(device)}
            self._processes.append(self._spawn(argv, env, rank, (lock_fd, *(meeting.fds if meeting and rank == 0 else ()))))

    def _spawn(self, argv: list[str], env: Mapping[str, str], rank: int, fds: Sequence[int]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=True,
            pass_fds=fds,
            preexec_fn=die_with_parent(),
        )
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        os.set_blocking(pipe, False)
        asyncio.get_running_loop().add_reader(pipe, self._drain, rank, pipe)
        return process

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        return len(self.exits) < len(self._processes)

    def poll(self) -> None:
        """Notes which ranks have ended. Of ends seen at once, signals come first: the others fail because of them."""
        known = {end.rank for end in self.exits}
        codes = ((rank, process.poll()) for rank, process in enumerate(self._processes, self._first_rank) if rank not in known)
        ends = (Exit(rank, code, code == -signal.SIGKILL and rank in self._killed) for rank, code in codes if code is not None)
        self.exits += sorted(ends, key=lambda end: end.code >= 0)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every rank that lives."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self, timeout_s: float = 5.0) -> bool:
        """Kills the ranks and all that descends from them or from us; True once nothing is left."""
        self.poll()
        self._killed |= {*range(self._first_rank, self._first_rank + len(self._processes))} - {end.rank for end in self.exits}
        deadline = time.monotonic() + timeout_s
        while left := _descendants():
            for descendant in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
            time.sleep(0.02)
            for process in self._processes:
                process.poll()
            _reap_orphans([process.pid for process in self._processes])
            if time.monotonic() > deadline:
                return False
        self.poll()
        return True

    def close(self) -> None:
        """Takes what is left in the ranks' pipes and lets go of them."""
        for rank, process in enumerate(self._processes, self._first_rank):
            assert process.stdout is not None
            if not process.stdout.closed:
                self._drain(rank, process.stdout.fileno(), everything=True)
                asyncio.get_running_loop().remove_reader(process.stdout.fileno())
                process.stdout.close()
                self._log.feed(rank, b"", last=True)

    def _drain(self, rank: int, pipe: int, everything: bool = False) -> None:
        try:
            while data := os.read(pipe, _PIPE_BYTES):
                self._log.feed(rank, data)
                if not everything:
                    return
        except BlockingIOError:
            return
        asyncio.get_running_loop().remove_reader(pipe)


def _descendants() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if _lives(child)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _reap_orphans(ours: Sequence[int]) -> None:
    """Buries the orphans that came to us; our own ranks are Popen's to bury."""
    for child in psutil.Process().children():
        if child.pid not in ours:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
