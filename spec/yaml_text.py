"""A spec as YAML text: what people write by hand, read with limits.

Only plain data passes: no tags, no anchors and aliases (an alias bomb needs them), no key twice, bounded size, depth
and number of keys. Scalars follow YAML 1.2's core schema, so `no` is a string and `1e-3` a number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from spec.experiment import ExperimentSpec

MAX_CHARACTERS = 256_000
MAX_DEPTH = 32
MAX_NODES = 5_000


class YamlError(ValueError):
    """The text is not a spec's YAML. `line` and `column` count from 1; 0 means unknown."""

    def __init__(self, reason: str, mark: Any = None) -> None:
        self.line: int = mark.line + 1 if mark else 0
        self.column: int = mark.column + 1 if mark else 0
        super().__init__(f"line {self.line}, column {self.column}: {reason}" if mark else reason)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's surprises (yes and no, 1:30, dates, <<)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise YamlError("a key must be a plain string", key.start_mark)
            if key.value in seen:
                raise YamlError(f"the key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """No merge keys: `<<` is a key like any other, and no field."""


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]{1,400}$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 10))


def load(text: str) -> Any:
    """The plain data in `text`. Raises YamlError, with the line, for anything else."""
    if len(text) > MAX_CHARACTERS:
        raise YamlError(f"{len(text):,} characters > limit {MAX_CHARACTERS:,}")
    try:
        _check(text)
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise YamlError(error.problem or "not YAML", error.problem_mark or error.context_mark) from error
    except yaml.YAMLError as error:
        raise YamlError(str(error).replace("\n", " ")) from error


def load_mapping(text: str) -> dict[str, Any]:
    """As `load`, for text that must hold fields: a whole spec, or a part of one."""
    data = load(text)
    if not isinstance(data, dict):
        raise YamlError(f"a spec is a mapping of fields, not {'nothing' if data is None else type(data).__name__}")
    return data


def dump(spec: ExperimentSpec) -> str:
    """`spec` as YAML, complete, in the order of its definition."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _check(text: str) -> None:
    """Refuses what would cost much to build, looking at one token after the other."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(f"aliases are not supported: *{event.anchor}", event.start_mark)
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            if event.anchor is not None or getattr(event, "tag", None) is not None:
                raise YamlError("anchors and tags are not supported", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH}", event.start_mark)
        if nodes > MAX_NODES:
            raise YamlError(f"more than {MAX_NODES:,} keys and values", event.start_mark)
