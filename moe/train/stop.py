"""How a training process ends: its exit codes, the exceptions behind them, and the requests that signals make.

The codes and reasons are those of docs/protocol.md, section 2.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

FINISHED, SPEC_REFUSED, ERROR, OUT_OF_MEMORY, DISK_FULL, STOPPED, NAN_LOSS, PEER_LOST = 0, 64, 70, 71, 74, 75, 76, 77
# What gloo and NCCL say, as plain RuntimeErrors or classes of their own, when another rank is gone. Where torch's NCCL watchdog notices it first,
# it ends the process by SIGABRT; whoever started it reads the same from its last words (workers/verdict.py).
_PEER_GONE = ("gloo/transport", "ncclRemoteError", "ncclSystemError", "NCCL communicator was aborted")
_PEER_GONE_CLASSES = ("DistNetworkError", "DistStoreError")


class SpecRefused(Exception):
    """The spec cannot be trained here. `field` is the dotted path of what is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field


class NotFinite(Exception):
    """The loss or the gradient of a step is NaN or infinite."""


class DiskFull(Exception):
    """There is no room for what has to be written."""


class Stopped(Exception):
    """SIGTERM asked for the end, and a checkpoint holds all that was done."""


def classify(error: BaseException) -> tuple[int, str]:
    """(exit code, reason) of what ended the training."""
    match error:
        case SpecRefused():
            return SPEC_REFUSED, "config_invalid"
        case NotFinite():
            return NAN_LOSS, "nan_loss"
        case Stopped():
            return STOPPED, "stopped"
        case DiskFull():
            return DISK_FULL, "disk_full"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return DISK_FULL, "disk_full"
        case MemoryError():
            return OUT_OF_MEMORY, "oom"
    text = str(error)
    if "No space left on device" in text or "Disk quota exceeded" in text:  # safetensors raises its own error class
        return DISK_FULL, "disk_full"
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or "not enough memory" in text:
        return OUT_OF_MEMORY, "oom"
    if type(error).__name__ in _PEER_GONE_CLASSES or any(words in text for words in _PEER_GONE):
        return PEER_LOST, "peer_lost"
    return ERROR, "error"


class Requests:
    """What signals have asked for since it was last looked at. A signal only sets a flag: the loop acts between steps."""

    def __init__(self) -> None:
        self.stop = False
        self.checkpoints = 0
        self._taken = 0

    def listen(self) -> None:
        """SIGTERM: stop after a checkpoint. SIGUSR1: checkpoint. SIGUSR2: every thread's stack to stderr. SIGINT counts as SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._checkpoint)
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)

    def take(self) -> tuple[bool, bool]:
        """Whether to stop, which stays asked, and whether to save, which is asked once."""
        asked = self.checkpoints  # counted, so that a signal between these lines is not lost
        save, self._taken = asked > self._taken, asked
        return self.stop, save

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _checkpoint(self, number: int, frame: FrameType | None) -> None:
        self.checkpoints += 1


def write_result(directory: Path, outcome: str, reason: str, detail: str) -> None:
    """Leaves result.json in the attempt's directory, whole or not at all; a full disk must not hide the real reason."""
    path = directory / "result.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"outcome": outcome, "reason": reason, "detail": detail}))
        temporary.replace(path)
    except OSError as error:
        print(f"result.json could not be written: {error}", file=sys.stderr)
