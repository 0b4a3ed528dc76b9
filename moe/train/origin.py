"""The weights that a run starts from, as they lie on this machine: of a run that was trained here, or at a path.

A path is a run's directory, its `checkpoints`, one checkpoint, or what `python -m moe.huggingface import` wrote. What is read is verified
against its manifest; nothing of it is changed, for it may be another run's.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe.train import checkpoint
from moe.train.ranks import Ranks
from moe.train.sources import allow
from moe.train.stop import SpecRefused
from spec.experiment import ExperimentSpec
from spec.start import FromCheckpoint, Upcycle


@dataclass(frozen=True)
class Origin:
    """Weights by name, on the CPU. `name` is what people call them; `spec` is None where nobody has kept it."""

    name: str
    tensors: dict[str, Tensor]
    spec: ExperimentSpec | None


def find(start: FromCheckpoint | Upcycle, home: Path, ranks: Ranks) -> Origin:
    """The checkpoint that `start` names, the same on every rank. Raises SpecRefused, with the reason, where there is none that is whole.

    One of a run is looked for in MOELAB_ORIGIN, if that is a directory: there it lies where it had to be brought to this host.
    """
    if start.run is not None:
        brought = Path(os.environ.get("MOELAB_ORIGIN") or os.devnull)
        directory = brought if brought.is_dir() else home / "runs" / str(start.run) / "checkpoints"
        where, name = "start.run", f"run {start.run}"
    else:
        text = start.path or ""
        directory, where, name = readable(text, "start.path", home), "start.path", text[:200]
        if not (directory / checkpoint.MANIFEST).is_file() and (directory / "model.safetensors").is_file():
            return _imported(directory, name)
        if (directory / checkpoint.MANIFEST).is_file():
            return _checkpoint(directory, where, name, start.step)
        directory = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    problem, found = "", -1
    if ranks.is_first:  # the others take its answer: a checkpoint that a living run replaces meanwhile must not split the ranks
        found, problem = _choose(directory, start.step)
    step = ranks.from_first(found)
    if step < 0:
        raise SpecRefused("start.step" if start.step is not None else where, f"{name} has no checkpoint on this machine: {problem or directory}")
    return _checkpoint(directory / f"step-{step:08d}", where, name, None)


def readable(text: str, where: str, home: Path) -> Path:
    """The directory `text` names. Raises SpecRefused unless it is there and may be read.

    The runs of this host are named by number, so that the server can ask who may see them.
    """
    try:
        path = Path(text).expanduser().resolve()
        allow(path, text, where)
        if path.is_relative_to((home / "runs").resolve()):
            raise SpecRefused(where, f"{text[:200]} lies among the runs of this host; give the run's number instead (run)")
        if not path.is_dir():
            raise SpecRefused(where, f"{text[:200]} is not a directory on this machine")
    except (OSError, RuntimeError) as error:
        raise SpecRefused(where, f"{text[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return path


def _choose(directory: Path, wanted: int | None) -> tuple[int, str]:
    """(step of the newest whole checkpoint or of `wanted`, "") or (-1, what is wrong)."""
    try:
        steps = checkpoint.steps(directory)
    except OSError as error:
        return -1, f"{directory} cannot be read: {error.strerror}"
    if wanted is not None and wanted not in steps:
        return -1, f"{directory} has steps {', '.join(map(str, steps[-10:])) or 'none'}, not {wanted}"
    problem = f"{directory} holds none"
    for step in reversed(steps) if wanted is None else [wanted]:
        try:
            checkpoint.verify(directory / f"step-{step:08d}")
        except checkpoint.Damaged as error:
            problem = str(error)
            continue
        return step, ""
    return -1, problem


def _checkpoint(path: Path, where: str, name: str, wanted: int | None) -> Origin:
    try:
        if wanted is not None and path.name != f"step-{wanted:08d}":
            raise SpecRefused("start.step", f"{wanted}, but {name} is {path.name}")
        checkpoint.verify(path)
        tensors = load_file(path / "model.safetensors")
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (checkpoint.Damaged, SafetensorError, OSError, ValueError) as error:
        raise SpecRefused(where, f"{name}: {error}") from error
    return Origin(f"{name} at step {state.get('step', '?')}", tensors, _spec(state.get("spec")))


def _imported(directory: Path, name: str) -> Origin:
    """Weights beside the spec that describes them."""
    try:
        tensors = load_file(directory / "model.safetensors")
        plain = json.loads((directory / "spec.json").read_text(encoding="utf-8")) if (directory / "spec.json").is_file() else None
    except (SafetensorError, OSError, ValueError) as error:
        raise SpecRefused("start.path", f"{name}: {error}") from error
    return Origin(name, tensors, _spec(plain))


def _spec(plain: Any) -> ExperimentSpec | None:
    """The spec that the weights were trained with; None where it was not kept, or is of another version of the language."""
    try:
        return None if plain is None else ExperimentSpec.model_validate(plain)
    except ValidationError:
        return None
