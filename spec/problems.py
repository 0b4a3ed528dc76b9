"""What is wrong with a spec, each problem at the field it lies in: what REST, form and command line show."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from spec.experiment import ExperimentSpec
from spec.fields import child, kinds

_VALUE_ERROR = "Value error, "
_SHOULD = re.compile(r"[A-Z][a-z]+ (should .*?)(?: after validation)?(?:, (?:unable|got|not|input|invalid|unexpected) .*)?")
_SHAPE = re.compile(r"should be a valid dictionary(?: or .*)?")


@dataclass(frozen=True)
class Problem:
    """`pointer` is a JSON pointer into the spec (RFC 6901; "" means all of it); `detail` names the field, what is wrong and the limit."""

    pointer: str
    detail: str

    def __str__(self) -> str:
        """One line: the dotted path, then what is wrong."""
        keys = self.pointer.split("/")[1:]
        return f"{'.'.join(keys)}: {self.detail.removeprefix(f'{name_of(keys)}: ')}" if keys else self.detail


def pointer(*keys: str | int) -> str:
    """The JSON pointer of `keys`."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def from_validation_error(error: ValidationError) -> list[Problem]:
    """The problems that pydantic found in an ExperimentSpec, in its order."""
    problems = []
    for item in error.errors(include_url=False):
        keys, annotation = _without_tags(item["loc"])
        message = item["msg"]
        if item["type"].startswith("union_tag"):
            keys, message = [*keys, "kind"], f"should be one of {', '.join(kinds(annotation))}"
        elif item["type"] == "extra_forbidden":
            message = "is not a field of the spec"
        else:
            message = said(item)
        rule = message.removeprefix(_VALUE_ERROR)
        named = _leading_field(annotation, rule) if rule != message else []
        if not named and keys:
            rule = f"{name_of(keys)}: {rule}"
        problems.append(Problem(pointer(*keys, *named), rule))
    return problems


def said(item: Mapping[str, Any]) -> str:
    """What an error of pydantic says is wrong, in our words: "should be less than or equal to 10, not 12"."""
    found = _SHOULD.fullmatch(str(item["msg"]))
    if found is None:
        return "is missing" if item["type"] == "missing" else str(item["msg"])
    rule = _SHAPE.sub("should be a mapping of fields", found[1])
    if isinstance(item["input"], str):
        rule = re.sub(r" items?$", " characters", rule)
    return f"{rule}, not {_shown(item['input'])}"


def name_of(keys: Sequence[str | int]) -> str:
    """How a message names the field at `keys`: by its last part, and by the place in a list: "tags.0"."""
    last = next((at for at in range(len(keys) - 1, 0, -1) if not str(keys[at]).isdigit()), 0)
    return ".".join(str(key) for key in keys[last:])


def _without_tags(loc: tuple[str | int, ...]) -> tuple[list[str | int], object]:
    """The path without the kinds that pydantic puts in it (attention, gqa, n_heads), and the annotation it ends at."""
    keys: list[str | int] = []
    annotation: object = ExperimentSpec
    for key in loc:
        choice = kinds(annotation)
        if isinstance(key, str) and key in choice:
            annotation = choice[key]
        else:
            keys.append(key)
            annotation = child(annotation, key)
    return keys, annotation


def _leading_field(annotation: object, rule: str) -> list[str]:
    """The path that a rule between fields starts with ("top_k 9 > n_experts 8"), so that the problem lies at a field; else empty."""
    path = rule.split(maxsplit=1)[0].split(".") if rule else []
    for key in path:
        annotation = child(annotation, key)
        if annotation is None:
            return []
    return path


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
