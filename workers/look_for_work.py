"""Answers the bell: says hello to the server, takes runs until this host is full or nothing waits, and starts their supervisors; then generations."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moelab import __version__
from moelab.client import Client
from moelab.home import home
from workers import generation
from workers.devices import Device, devices, label, slots
from workers.host import living
from workers.launch import LaunchError, launch
from workers.storage import storage_url

logger = logging.getLogger(__name__)


def worker_name() -> str:
    """MOELAB_WORKER_NAME, or the host's name."""
    return os.environ.get("MOELAB_WORKER_NAME") or socket.gethostname()


def look_for_work() -> int:
    """How many runs were started. Raises ApiError, ServerUnreachable, LaunchError: the next bell tries again."""
    started = 0
    home().mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(home() / "worker.lock"), Client() as client:
        n_slots = slots(devices())
        found = devices(n_slots)
        me, here = {"name": worker_name(), "host": socket.gethostname(), "version": __version__}, storage_url()
        worker = client.hello(**me, pid=os.getppid(), devices=list(found), slots=n_slots, storage=here)
        while free := free_devices(found, n_slots, home()):
            n_free, labels = free
            claim = client.claim(worker=worker, free_slots=n_free, free_devices=labels)
            if claim is None:
                break
            node = f" as node {claim['node']} of {claim['nodes']}" if claim.get("nodes", 1) > 1 else ""
            logger.info("run %s, attempt %s, on %s%s", claim["run"], claim["attempt"], ", ".join(claim["devices"]), node)
            launch(claim, home() / "runs")
            started += 1
        answer_generations(client, worker)
    return started


def answer_generations(client: Client, worker: int) -> None:
    """Starts the answering of generations, if any waits and nobody on this host is at it. Raises ApiError, ServerUnreachable, LaunchError."""
    free = generation.lock()
    if free is None:
        return
    os.close(free)
    offer = generation.take(client, worker)
    if offer is None:
        return
    try:
        generation.start(worker, offer)
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"generation {offer.generation}: {error}") from error


def free_devices(found: list[Device], n_slots: int, at_home: Path) -> tuple[int, list[str]] | None:
    """How many slots are free, and the labels of the free devices; None where the host is full. An attempt whose ranks
    have ended, and which only ships, takes nothing."""
    training = [holder for holder in living(at_home) if holder.devices or not holder.supervisor[0]]
    n_free = n_slots - len(training)
    if n_free <= 0:
        return None
    taken = {device for holder in training for device in holder.devices}
    cuda = [label(device) for device in found if device["kind"] == "cuda" and label(device) not in taken]
    return n_free, [*cuda, *[label(device) for device in found if device["kind"] == "cpu"][:n_free]]


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Two bells that ring at once, in two processes, do not count the same slot twice."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
