"""Checkpoints that are either whole or not there: safetensors and JSON under a manifest of sizes and SHA-256.

    checkpoints/step-00000100/   model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

A checkpoint is built under a temporary name, every file is forced to the disk, and one rename publishes it. A reader
checks every byte against the manifest, puts a damaged one aside, and takes the one before. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "MANIFEST.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"step-\d+\.(\d+)\.tmp")


class Damaged(Exception):
    """A checkpoint that does not hold what its manifest says."""


@dataclass(frozen=True)
class Saved:
    """A published checkpoint. `sha256` is the manifest's."""

    path: Path
    step: int
    size_bytes: int
    sha256: str
    seconds: float


def crash_point(name: str) -> None:
    """Kills this process here if the environment's MOELAB_CRASH_AT names this point: for tests of what a crash leaves behind."""
    if os.environ.get("MOELAB_CRASH_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


# ----- writing


def save(directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Saved:
    """Publishes a checkpoint: one safetensors file per key of `tensors`, and `state` as JSON. Raises OSError where the disk is full."""
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    work = directory / f"{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        for name, group in tensors.items():
            save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, work / f"{name}.safetensors")
            crash_point(f"ckpt.after_{name}")
        (work / "state.json").write_text(json.dumps(state))
        crash_point("ckpt.after_files")
        files = {path.name: {"size": path.stat().st_size, "sha256": _sync_and_hash(path)} for path in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1))
        manifest = _sync_and_hash(work / MANIFEST)
        _sync_directory(work)
        crash_point("ckpt.before_rename")
        if final.exists():
            _discard(final)
        work.rename(final)
        _sync_directory(directory)
        crash_point("ckpt.after_rename")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in final.iterdir())
    return Saved(final, step, size, manifest, time.monotonic() - started)


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Removes a directory so that a crash half-way never leaves it under a checkpoint's name."""
    doomed = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    while doomed.exists():
        doomed = doomed.with_name(doomed.name.replace(".tmp", "0.tmp"))
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# ----- keeping


def steps(directory: Path) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)))


def prune(directory: Path, keep: int, newest: Saved) -> list[int]:
    """Removes all but the `keep` newest checkpoints, and what was put aside; returns the removed steps. `newest`, just written, stays."""
    crash_point("ckpt.before_prune")
    removed = [step for step in steps(directory)[:-keep] if step != newest.step]
    for step in removed:
        _discard(directory / f"step-{step:08d}")
    for path in [*directory.glob("step-*.damaged"), *directory.glob("step-*.left")]:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def sweep(directory: Path) -> None:
    """Removes the temporary directories of writers that are dead."""
    for path in directory.glob("step-*.tmp"):
        match = _LEFT_OVER.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a number used again: this process has not begun to write
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ----- reading


def verify(path: Path) -> None:
    """Raises Damaged unless `path` holds exactly the files of its manifest, byte for byte."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        match = _NAME.fullmatch(path.name)
        if manifest["format"] != _FORMAT or not match or manifest["step"] != int(match[1]):
            raise Damaged(f"{path}: the manifest is of another format or step")
        if {file.name for file in path.iterdir()} != {*manifest["files"], MANIFEST}:
            raise Damaged(f"{path}: files are missing or were added")
        for name, item in manifest["files"].items():
            with (path / name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != item["size"] or hashlib.file_digest(file, "sha256").hexdigest() != item["sha256"]:
                    raise Damaged(f"{path}: {name} is not what the manifest says")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: {error}") from error


def newest_whole(directory: Path) -> tuple[int | None, list[str]]:
    """The step of the newest checkpoint that verifies (None: there is none), and what was wrong with newer ones, which are put aside."""
    complaints = []
    for step in reversed(steps(directory)):
        path = directory / f"step-{step:08d}"
        try:
            verify(path)
        except Damaged as error:
            complaints.append(str(error))
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            continue
        return step, complaints
    return None, complaints


def load(directory: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state) of a checkpoint, on the CPU."""
    path = directory / f"step-{step:08d}"
    tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return tensors, state
