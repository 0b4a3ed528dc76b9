"""The fields of the spec by name: what may stand at a path, and which kinds a part can be."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel


def parts(annotation: object) -> list[type[BaseModel]]:
    """The models that may stand where `annotation` does; empty for plain values."""
    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def kinds(annotation: object) -> Mapping[str, type[BaseModel]]:
    """The models that may stand here by their `kind`, where there is a choice; else empty."""
    choice = parts(annotation)
    return {part.model_fields["kind"].default: part for part in choice} if len(choice) > 1 else {}


def child(annotation: object, key: str | int) -> Any:
    """The annotation of field `key` (of any kind), or of a list's item; None where there is no such thing."""
    if isinstance(key, int):
        return next((get_args(member)[0] for member in _members(annotation) if get_origin(member) is list), None)
    return next((part.model_fields[key].annotation for part in parts(annotation) if key in part.model_fields), None)


def _members(annotation: object) -> tuple[Any, ...]:
    """The annotation's alternatives, without None and without Annotated's decoration."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for argument in get_args(annotation) for member in _members(argument) if member is not NoneType)
    if hasattr(annotation, "__metadata__"):
        return _members(get_args(annotation)[0])
    return (annotation,)
