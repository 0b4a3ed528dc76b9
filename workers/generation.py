"""Answers generations, one after the other, until none waits: each is a process of its own, `python -m moe.generate`.

    python -m workers.generation        with {worker, offer} as JSON on stdin; returns at once, the answering goes on alone

A host answers one at a time, on the CPU unless MOELAB_GENERATE_DEVICE names another device, with the lowest priority: training goes first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from moelab.client import ApiError, Client, ServerUnreachable
from moelab.home import home
from spec.storage import Place
from spec.text import storable_text
from workers.detach import detach
from workers.fetch import DISK_FULL, THERE, Fetch, Wanted
from workers.linux import die_with_parent
from workers.ranks import SECRETS

TIMEOUT_S = float(os.environ.get("MOELAB_GENERATE_TIMEOUT_S", "300"))
_TELL_S = 60.0
_LOOK_S = 0.1
_GONE, _CONFLICT, _TOO_LARGE, _INVALID = 404, 409, 413, 422
_NOT_HERE = 66
_DISK_FULL = {"outcome": "failed", "reason": "disk_full", "detail": "the disk of the host that fetched the checkpoint is full"}
FETCHED = "fetched"
"""In MOELAB_HOME: checkpoints of runs that this host does not train, the last two of them."""
_REASON_OF_CODE = {64: "config_invalid", 71: "oom", 74: "disk_full"}

logger = logging.getLogger("workers.generation")


class Offer(BaseModel):
    """A generation that this worker may answer (docs/protocol.md, section 3)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    generation: int = Field(ge=1)
    attempt: int = Field(ge=1)
    run: int = Field(ge=1)
    step: int = Field(ge=0)
    sha256: str
    prompt: str
    parameters: dict[str, int | float]
    heartbeat_s: float = Field(gt=0)
    place: Place | None = None
    spec: dict[str, Any] | None = None

    @property
    def run_dir(self) -> Path:
        """The run's directory, or what was fetched in its stead."""
        own = home() / "runs" / str(self.run)
        return own if self.place is None or self._lies_in(own) else home() / FETCHED / self.place.rpartition("/")[0].replace("/", ".")

    def is_here(self) -> bool:
        """Whether this host has the very checkpoint: the same manifest, not only the same number of a run and a step."""
        return self._lies_in(self.run_dir)

    def _lies_in(self, run_dir: Path) -> bool:
        manifest = run_dir / "checkpoints" / f"step-{self.step:08d}" / "MANIFEST.json"
        try:
            return hashlib.sha256(manifest.read_bytes()).hexdigest() == self.sha256
        except OSError:
            return False


def take(client: Client, worker: int) -> Offer | None:
    """The next generation whose checkpoint is on this host or in its storage, or None; the others go back. Raises ApiError, ServerUnreachable."""
    while (told := client.claim_generation(worker=worker)) is not None:
        offer = Offer.model_validate(told)
        if offer.is_here() or offer.place is not None:
            return offer
        client.answer_generation(offer.generation, attempt=offer.attempt, outcome="not_here")
    return None


def lock() -> int | None:
    """The descriptor that holds this host's right to answer; None while another process has it."""
    home().mkdir(parents=True, exist_ok=True)
    fd = os.open(home() / "generation.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def answering() -> int | None:
    """The process that answers on this host now, if there is one."""
    fd = lock()
    if fd is not None:
        os.close(fd)
        return None
    text = (home() / "generation.lock").read_text()
    return int(text) if text.isdigit() else None


def answer(client: Client, offer: Offer) -> None:
    """Runs the generation and tells how it went, unless somebody else has it by then. Raises ApiError, ServerUnreachable."""
    if not offer.is_here():
        code = _fetched(client, offer)
        if code != THERE:
            if code is not None:
                _tell(client, offer, _DISK_FULL if code == DISK_FULL else {"outcome": "not_here"})
            return
    with tempfile.TemporaryDirectory(prefix="moelab-generation-") as scratch:
        out, log = Path(scratch) / "result.json", Path(scratch) / "log.txt"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                _command(offer, out),
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                preexec_fn=_last_in_line(),
            )
        try:
            _send(offer.prompt, process)
            code = _watched(client, offer, process)
        finally:
            process.kill()
            process.wait()
        if code is not None:
            _tell(client, offer, _outcome(code, out, log))


def _fetched(client: Client, offer: Offer) -> int | None:
    """Fetches the checkpoint from the storage, and forgets what was fetched before the last one; the exit code as _watched has it."""
    assert offer.place is not None
    run_dir = offer.run_dir
    others = sorted((path.stat().st_mtime, path) for path in run_dir.parent.glob("*") if path != run_dir)
    for _, path in others[:-1]:
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    (run_dir / "spec.json").write_text(json.dumps(offer.spec))
    with Fetch(Wanted(place=offer.place, sha256=offer.sha256, run_dir=run_dir)) as fetching:
        code = _watched(client, offer, fetching.process)
        if code:
            logger.warning("%s could not be fetched: %s", offer.place, fetching.words)
        return code


def _command(offer: Offer, out: Path) -> list[str]:
    options = [word for name, value in offer.parameters.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    where = [str(offer.run_dir), "--step", str(offer.step), "--prompt-file", "-", "--out", str(out)]
    return [sys.executable, "-m", os.environ.get("MOELAB_GENERATOR", "moe.generate"), *where, *options]


def _environment() -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
    device = os.environ.get("MOELAB_GENERATE_DEVICE", "cpu")
    return kept | {"MOELAB_DEVICE": device, "MOELAB_THREADS": str(threads), "MOELAB_HOME": str(home())}


def _last_in_line() -> Callable[[], None]:
    """A `preexec_fn`: the child goes when we go, and lets everything else on the host go first."""
    die = die_with_parent()

    def ask() -> None:
        die()
        os.nice(10)

    return ask


def _send(prompt: str, process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(prompt.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already; its exit code says why


def _watched(client: Client, offer: Offer, process: subprocess.Popen[bytes]) -> int | None:
    """The exit code; -SIGKILL past the time limit; None where the generation is no longer ours. A server that is away is borne."""
    deadline = time.monotonic() + TIMEOUT_S
    beat = time.monotonic() + offer.heartbeat_s
    while (code := process.poll()) is None:
        now = time.monotonic()
        if now > deadline:
            process.kill()
            return -signal.SIGKILL
        if now > beat:
            beat = now + offer.heartbeat_s
            try:
                client.keep_generation(offer.generation, attempt=offer.attempt)
            except ServerUnreachable as error:
                logger.warning("%s", error)
            except ApiError as error:
                if error.status in (_GONE, _CONFLICT):
                    return None
                logger.warning("%s", error)
        time.sleep(_LOOK_S)
    return code


def _outcome(code: int, out: Path, log: Path) -> dict[str, Any]:
    """The answer that an exit code stands for."""
    if code == 0:
        try:
            return {"outcome": "succeeded", "result": json.loads(out.read_text(encoding="utf-8"))}
        except (OSError, ValueError) as error:
            return {"outcome": "failed", "reason": "error", "detail": f"its result cannot be read: {error}"}
    if code == _NOT_HERE:
        return {"outcome": "not_here"}
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return {"outcome": "failed", "reason": "killed", "detail": f"ended by signal {-code}; it may take {TIMEOUT_S:.0f} s at most"}
    detail = storable_text(lines[-1][-2000:]) if lines else f"exit code {code}"
    return {"outcome": "failed", "reason": _REASON_OF_CODE.get(code, "error"), "detail": detail}


def _tell(client: Client, offer: Offer, said: Mapping[str, Any]) -> None:
    """Sends the answer; bears a server that is away for _TELL_S. What the server does not take is told it as a failure."""
    deadline = time.monotonic() + _TELL_S
    while True:
        try:
            client.answer_generation(offer.generation, attempt=offer.attempt, **said)
            return
        except ServerUnreachable:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        except ApiError as error:
            if error.status in (_GONE, _CONFLICT):
                return
            if error.status not in (_TOO_LARGE, _INVALID) or said["outcome"] != "succeeded":
                raise
            said = {"outcome": "failed", "reason": "error", "detail": f"the server did not take the result: {str(error)[:1000]}"}


def start(worker: int, offer: Offer) -> None:
    """Starts a process that answers `offer` and what waits behind it, and that outlives the caller. Raises OSError, subprocess.SubprocessError."""
    told = json.dumps({"worker": worker, "offer": offer.model_dump()}).encode()
    subprocess.run(
        [sys.executable, "-m", "workers.generation"],
        input=told,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=20,
        check=True,
    )


def main() -> int:
    """Takes the lock, lets the caller go, and answers. Exit codes: 0 done or detached, 3 another process answers on this host."""
    told = json.load(sys.stdin)
    worker, offer = int(told["worker"]), Offer.model_validate(told["offer"])
    os.umask(0o077)
    held = lock()
    if held is None:
        return 3
    if os.fork():
        os._exit(0)  # the lock stays with the child
    os.ftruncate(held, 0)
    os.pwrite(held, str(os.getpid()).encode(), 0)
    detach(home() / "generation.log")
    following: Offer | None = offer
    with Client() as client:
        while following is not None:
            try:
                logger.info("generation %s of run %s, attempt %s", following.generation, following.run, following.attempt)
                answer(client, following)
                following = take(client, worker)
            except (ApiError, ServerUnreachable) as error:  # its lease runs out, and it is handed out again
                logger.warning("%s", error)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
