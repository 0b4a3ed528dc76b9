"""Single fields of a spec changed by dotted path: `model.moe.top_k=4`, `model.moe.balance.0.coefficient=0.1`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from spec.experiment import ExperimentSpec
from spec.fields import child, kinds, parts


class OverrideError(ValueError):
    """The path is no field of the spec. `path` is the dotted path as it was given."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


def apply(spec: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `spec` (plain data, whole or partial) with `changes` made; values are checked when it is validated.

    A part that is missing or null is begun with its defaults. Changing a part's `kind` keeps the fields that both
    kinds have. Raises OverrideError for a path that leads nowhere.
    """
    changed = copy.deepcopy(dict(spec))
    for path in sorted(changes, key=lambda path: (not path.endswith(".kind"), path.count("."))):
        _set(changed, path, copy.deepcopy(changes[path]))
    return changed


def _set(spec: dict[str, Any], path: str, value: Any) -> None:
    keys = path.split(".")
    here: Any = spec
    annotation: object = ExperimentSpec
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            here, annotation = _item(here, annotation, key, path, value, last)
            continue
        part = _part_of(annotation, here)
        if part is None or key not in part.model_fields:
            raise OverrideError(path, _unknown(part, keys[:depth], key))
        if last:
            if key == "kind" and value != here.get("kind"):
                _change_kind(here, annotation, value)
            here[key] = value
            return
        annotation = part.model_fields[key].annotation
        if here.get(key) is None and parts(annotation):
            here[key] = _begin(annotation, part, key)
        here = here.get(key)


def _item(here: list[Any], annotation: object, key: str, path: str, value: Any, last: bool) -> tuple[Any, object]:
    """Sets or enters item `key` of the list `here`."""
    if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= len(here):
        raise OverrideError(path, f"{key[:20]!r} is not an index of a list of {len(here)}")
    if last:
        here[int(key)] = value
    return here[int(key)], child(annotation, int(key))


def _part_of(annotation: object, here: Any) -> type[BaseModel] | None:
    """The part that stands at `here`; None for a plain value."""
    if not isinstance(here, dict):
        return None
    choice = kinds(annotation)
    if choice:
        return choice.get(str(here.get("kind")))
    return next(iter(parts(annotation)), None)


def _begin(annotation: object, parent: type[BaseModel], key: str) -> dict[str, Any]:
    """An empty part of its default kind, for a path that goes through a missing one."""
    default = parent.model_fields[key].get_default(call_default_factory=True)
    return {"kind": default.kind} if kinds(annotation) else {}


def _change_kind(here: dict[str, Any], annotation: object, kind: Any) -> None:
    """Drops what the new kind does not have."""
    part = kinds(annotation).get(str(kind))
    for name in list(here):
        if part is not None and name not in part.model_fields:
            del here[name]


def _unknown(part: type[BaseModel] | None, parents: list[str], key: str) -> str:
    where = ".".join(parents) or "the spec"
    if part is None:
        return f"{where} has no fields"
    near = get_close_matches(key, part.model_fields, n=1)
    return f"{where} has no field {key!r}" + (f"; did you mean {near[0]!r}?" if near else f", only {', '.join(part.model_fields)}")
