"""The spec of a run: read, checked, and refused where this trainer cannot run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe.train.stop import SpecRefused
from spec import problems, trainable
from spec.experiment import ExperimentSpec


def read_spec(source: str) -> ExperimentSpec:
    """From a .json or .yaml file, or a preset's name. Raises SpecRefused with every problem at its field."""
    try:
        spec = _read(source)
    except ValidationError as error:
        raise _refusal(problems.from_validation_error(error)) from error
    found = trainable.problems(spec)
    if found:
        raise _refusal(found)
    return spec


def _read(source: str) -> ExperimentSpec:
    path = Path(source)
    if path.suffix not in (".json", ".yaml", ".yml"):
        return _preset(source)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecRefused("", f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SpecRefused("", f"{path} is not UTF-8 text") from error
    return ExperimentSpec.model_validate(_json(path, text) if path.suffix == ".json" else _yaml(path, text))


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecRefused("", f"{path} is not JSON: {error}") from error


def _yaml(path: Path, text: str) -> Any:
    from spec.yaml_text import load_mapping  # a run that a worker starts is JSON, and does without it

    try:
        return load_mapping(text)
    except ValueError as error:
        raise SpecRefused("", f"{path} is not YAML: {error}") from error


def _preset(name: str) -> ExperimentSpec:
    from spec import presets

    try:
        return presets.load(name)
    except presets.UnknownPresetError as error:
        raise SpecRefused("", f"{error}; a spec of your own is a .json or .yaml file") from error


def _refusal(found: list[problems.Problem]) -> SpecRefused:
    return SpecRefused("", "; ".join(str(problem) for problem in found))
