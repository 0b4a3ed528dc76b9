"""What every piece of a spec is made of: closed, immutable, each field with its help, unit and limits."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Part(BaseModel):
    """A closed, immutable piece of a spec: unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def field(default: Any, help: str, *, unit: str | None = None, **limits: Any) -> Any:
    """A field with its help text, unit and limits, in the form that the page and OpenAPI read."""
    extra: dict[str, JsonValue] | None = {"unit": unit} if unit else None
    return Field(default, description=help, json_schema_extra=extra, **limits)
