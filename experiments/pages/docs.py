"""The API's reference, written from the same OpenAPI document that machines read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from experiments.access import Principal
from experiments.api.schema import openapi
from experiments.pages.gate import page

_METHODS = ("get", "post", "put", "patch", "delete")


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    text: str
    parameters: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(name, where, type, description)"""
    body: list[tuple[str, str, bool, str]] = field(default_factory=list)
    """(field, type, required, description)"""
    answers: list[tuple[str, str]] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """A name to link to."""
        return f"{self.method}-{self.path.strip('/').replace('/', '-').replace('{', '').replace('}', '')}"


@page
def reference(request: HttpRequest, principal: Principal) -> HttpResponse:
    """The page."""
    return render(request, "pages/docs.html", {"groups": groups(), "origin": request.build_absolute_uri("/")[:-1]})


@cache
def groups() -> list[tuple[str, list[Operation]]]:
    """The operations by the first word of their path, in the order of the document."""
    found: dict[str, list[Operation]] = {}
    for operation in _operations(openapi()):
        found.setdefault(operation.path.removeprefix("/api/v1/").split("/")[0], []).append(operation)
    return list(found.items())


def _operations(document: Mapping[str, Any]) -> Iterator[Operation]:
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        for method in (name for name in _METHODS if name in methods):
            told = methods[method]
            # The problems that every operation may answer with are said once, on top.
            answers = [(status, answer.get("description", "")) for status, answer in told["responses"].items() if status < "300"]
            text = told.get("description", "")
            yield Operation(
                method.upper(),
                path,
                told.get("summary", text.split("\n")[0]),
                text,
                [(one["name"], one["in"], _type(one.get("schema", {})), one.get("description", "")) for one in told.get("parameters", [])],
                list(_fields(told.get("requestBody"), schemas)),
                answers,
            )


def _fields(body: Mapping[str, Any] | None, schemas: Mapping[str, Any]) -> Iterator[tuple[str, str, bool, str]]:
    for content in (body or {}).get("content", {}).values():
        schema = content.get("schema", {})
        schema = schemas.get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)
        for name, child in schema.get("properties", {}).items():
            yield name, _type(child), name in schema.get("required", []), child.get("description", "")


def _type(schema: Mapping[str, Any]) -> str:
    """A schema in a few words: its type, and its limits where it has some."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(json.dumps(one) for one in schema["enum"])
    kind = schema.get("type", "any")
    kind = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    limits = [
        f"{sign} {schema[key]:,}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return f"{kind} {', '.join(limits)}".strip()
