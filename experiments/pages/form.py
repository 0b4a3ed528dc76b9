"""The form of a spec, from its JSON Schema: the tree of groups, choices and fields that the templates render.

Nothing here knows a field by name: help, unit, range and default all come from `spec.experiment`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

from spec.experiment import ExperimentSpec

Schema = Mapping[str, Any]

TITLES = {"moe": "Mixture of experts", "gqa": "Grouped-query attention", "mla": "Multi-head latent attention"}
TITLES |= {"start": "First weights", "scratch": "From scratch", "checkpoint": "A checkpoint of this model (fine-tuning)"}
TITLES |= {"huggingface": "A Hugging Face checkpoint", "upcycle": "A dense model, upcycled"}


@dataclass(frozen=True)
class Field:
    """One value. `kind` is int, number, bool, text, choice, choices or lines."""

    path: str
    kind: str
    help: str = ""
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False
    choices: tuple[str, ...] = ()
    nullable: bool = False
    default: Any = None
    options: Mapping[str, str] = field(default_factory=dict)
    when: Mapping[str, Sequence[str]] = field(default_factory=dict)
    node: ClassVar[str] = "field"

    @property
    def when_path(self) -> str:
        """The path of the field that decides whether this one means anything; empty where none does."""
        return next((f"{self.path.rpartition('.')[0]}.{key}" for key in self.when), "")

    @property
    def when_values(self) -> str:
        """The values of that field for which it does, apart by spaces."""
        return " ".join(value for values in self.when.values() for value in values)

    @property
    def described_choices(self) -> list[tuple[str, str]]:
        """Each choice and what it is, as far as the spec says."""
        return [(choice, self.options.get(choice, "")) for choice in self.choices]

    @property
    def key(self) -> str:
        """The last part of the path: the name in YAML."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def default_text(self) -> str:
        """The default as it stands in the field; the empty string where there is none."""
        return "" if self.default is None or isinstance(self.default, list) else str(self.default)

    @property
    def range_text(self) -> str:
        """The range in words; empty where there is none worth saying."""
        low, high = self.minimum, self.maximum
        if self.kind not in ("int", "number") or (low is None and high is None):
            return ""
        if low is None:
            return f"≤ {high:,.10g}"
        if self.exclusive or high is None:
            return f"{'>' if self.exclusive else '≥'} {low:,.10g}"
        return f"{low:,.10g} – {high:,.10g}"


@dataclass(frozen=True)
class Group:
    """A part of the spec. `optional`: it may be null."""

    path: str
    title: str
    help: str
    fields: list[Field] = field(default_factory=list)
    parts: list[Group | Choice | Terms] = field(default_factory=list)
    optional: bool = False
    node: ClassVar[str] = "group"


@dataclass(frozen=True)
class Choice:
    """One of several parts, told apart by their `kind`. `optional`: it may be null."""

    path: str
    title: str
    help: str
    variants: list[tuple[str, Group]]
    optional: bool = False
    node: ClassVar[str] = "choice"


@dataclass(frozen=True)
class Terms:
    """A list of parts, each kind at most once."""

    path: str
    title: str
    help: str
    variants: list[tuple[str, Group]]
    node: ClassVar[str] = "terms"


@cache
def spec_form() -> Group:
    """The whole form."""
    schema = ExperimentSpec.model_json_schema()
    return _Reader(schema.get("$defs", {})).group(schema, "", "Experiment")


def sections() -> list[Group | Choice | Terms]:
    """The form's parts in the order in which they are asked: what makes a Mixture of Experts comes first, and on its own."""
    parts = {part.path: part for part in spec_form().parts}
    model = parts.pop("model")
    assert isinstance(model, Group)
    inner = {part.path: part for part in model.parts}
    moe = inner.pop("model.moe")
    return [moe, replace(model, parts=[]), *inner.values(), parts.pop("training"), *parts.values()]


class _Reader:
    def __init__(self, defs: Mapping[str, Schema]) -> None:
        self._defs = defs

    def group(self, schema: Schema, path: str, title: str, *, optional: bool = False) -> Group:
        found = Group(path, title, schema.get("description", ""), optional=optional)
        for key, child in schema.get("properties", {}).items():
            if key == "kind" and "const" in child:
                continue
            node = self.node(child, f"{path}.{key}" if path else key)
            (found.fields if isinstance(node, Field) else found.parts).append(node)  # type: ignore[arg-type]
        return found

    def node(self, schema: Schema, path: str) -> Group | Choice | Terms | Field:
        key = path.rsplit(".", 1)[-1]
        title = TITLES.get(key, key.replace("_", " ").capitalize())
        inner, nullable = self._without_null(schema)
        help_text = str(schema.get("description", ""))
        if "oneOf" in inner:
            return Choice(path, title, help_text, self._variants(inner, path), nullable)
        if inner.get("type") == "array" and "oneOf" in inner.get("items", {}):
            return Terms(path, title, help_text, self._variants(inner["items"], path))
        if inner.get("type") == "object":
            return self.group(inner, path, title, optional=nullable)
        found = self._field(inner, path, help_text, schema.get("unit", inner.get("unit", "")), nullable)
        return replace(found, default=schema.get("default"), options=schema.get("options", {}), when=schema.get("when", {}))

    def _variants(self, schema: Schema, path: str) -> list[tuple[str, Group]]:
        parts = [self._resolved(one) for one in schema["oneOf"]]
        kinds = [str(part["properties"]["kind"]["const"]) for part in parts]
        return [
            (kind, self.group(part, path, TITLES.get(kind, kind.replace("_", " ").capitalize()))) for kind, part in zip(kinds, parts, strict=True)
        ]

    def _field(self, schema: Schema, path: str, help_text: str, unit: str, nullable: bool) -> Field:
        choices = tuple(str(one) for one in schema.get("enum", [schema["const"]] if "const" in schema else ()))
        kind = {"integer": "int", "number": "number", "boolean": "bool", "array": "lines"}.get(schema.get("type", ""), "text")
        if choices:
            kind = "choice"
        items = self._resolved(schema.get("items", {}))
        if kind == "lines" and "enum" in items:
            kind, choices = "choices", tuple(items["enum"])
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", schema.get("exclusiveMaximum"))
        return Field(path, kind, help_text, unit, low, high, "exclusiveMinimum" in schema, choices, nullable)

    def _without_null(self, schema: Schema) -> tuple[Schema, bool]:
        options = schema.get("anyOf")
        if not options:
            return self._resolved(schema), False
        kept = [one for one in options if one.get("type") != "null"]
        return self._resolved(kept[0]), len(kept) < len(options)

    def _resolved(self, schema: Schema) -> Schema:
        ref = schema.get("$ref")
        return {**self._defs[ref.rsplit("/", 1)[-1]], **{k: v for k, v in schema.items() if k != "$ref"}} if ref else schema
