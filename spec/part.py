"""What every piece of a spec is made of: closed, immutable, each field with its help, unit and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Part(BaseModel):
    """A closed, immutable piece of a spec: unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def field(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    when: Mapping[str, Sequence[str]] | None = None,
    options: Mapping[str, str] | None = None,
    **limits: Any,
) -> Any:
    """A field with its help text, unit and limits, in the form that the page and OpenAPI read.

    `when` names a field beside it and the values of that one for which it means anything; `options` says what each of its values is.
    """
    extra: dict[str, JsonValue] = {"unit": unit} if unit else {}
    if when:
        extra["when"] = {key: list(values) for key, values in when.items()}
    if options:
        extra["options"] = dict(options)
    return Field(default, description=help, json_schema_extra=extra or None, **limits)
