"""Every method that can be chosen: its rule, its source, the piece of a spec that chooses it, and the test that proves it.

`python -m spec.methods` writes docs/methods.md. A method is data in the YAML files beside this module, one for each group;
its `spec` holds only what differs from the default spec.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from spec.experiment import ExperimentSpec
from spec.yaml_text import load_mapping

_DIRECTORY = Path(__file__).parent
Group = Literal["routers", "balancing", "capacity", "architecture", "training"]
GROUPS: tuple[Group, ...] = get_args(Group)


class UnknownMethodError(KeyError):
    """No method has this key."""


class Method(BaseModel):
    """A method of routing, balancing, capacity, architecture or training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    group: Group
    name: str
    rule: str = Field(description="The formula in words.")
    source: str = Field(description="Paper and equation or section, or the released code.")
    spec: dict[str, Any] = Field(description="What differs from the default spec; it validates by itself.")
    reports: str = Field(description="What a run's page shows of it.")
    oracle: str = Field(description="What it is proven against.")
    test: str = Field(description="The proof: a test's file and name.")
    priced_only: bool = Field(False, description="The accountant knows it; the trainer does not.")

    def experiment(self) -> ExperimentSpec:
        """The default spec with this method."""
        return ExperimentSpec.model_validate({"name": self.key.replace("_", "-"), **self.spec})


@cache
def methods() -> tuple[Method, ...]:
    """All of them, group by group."""
    return tuple(
        Method.model_validate({**entry, "key": key, "group": group})
        for group in GROUPS
        for key, entry in load_mapping((_DIRECTORY / f"{group}.yaml").read_text(encoding="utf-8")).items()
    )


def method(key: str) -> Method:
    """The method with this key. Raises UnknownMethodError."""
    for found in methods():
        if found.key == key:
            return found
    raise UnknownMethodError(key)
