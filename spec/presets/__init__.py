"""Published architectures at full size, and small ones that train on a laptop, as YAML files beside this module.

A published preset describes the model alone: its data, optimiser and training settings are this program's, not the
publication's. `published` holds the figures as printed by the source, with the convention of "active" that they follow.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from spec.experiment import ExperimentSpec
from spec.yaml_text import load_mapping

_DIRECTORY = Path(__file__).parent


class UnknownPresetError(KeyError):
    """No preset has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class Published(BaseModel):
    """What the source prints."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    total: str = Field(description="Total parameters, as printed.")
    active: str | None = Field(None, description="Active parameters, as printed.")
    active_convention: Literal["with_embeddings", "without_input_embedding", "without_embeddings"] | None = Field(
        None, description="The field of the price's active_params that gives the printed figure."
    )
    difference: str = Field("", description="Why a printed figure is not the one that is counted here, to the parameter where it is known.")


class Description(BaseModel):
    """A preset without its spec."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    size: Literal["nano", "full"] = Field(description="nano trains on two cores in a minute or two; full is priced, not trained.")
    about: str
    source: str = Field("", description="Where the figures come from.")
    leaves_out: str = Field("", description="What the original has and this description cannot say.")
    published: Published | None = None


class _File(Description):
    spec: ExperimentSpec


def names() -> list[str]:
    """Every preset, the small ones first."""
    found = (path.stem for path in _DIRECTORY.glob("*.yaml"))
    return sorted(found, key=lambda name: (not name.startswith("nano-"), name))


def load(name: str) -> ExperimentSpec:
    """The spec of preset `name`. Raises UnknownPresetError."""
    return _read(name).spec


def describe(name: str) -> Description:
    """Title, source and published figures of preset `name`. Raises UnknownPresetError."""
    return Description.model_validate(_read(name).model_dump(exclude={"spec"}))


@cache
def _read(name: str) -> _File:
    known = names()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise UnknownPresetError(f"no preset {name!r}" + (f"; did you mean {near[0]!r}?" if near else f", only {', '.join(known)}"))
    data = load_mapping((_DIRECTORY / f"{name}.yaml").read_text(encoding="utf-8"))
    size = "nano" if name.startswith("nano-") else "full"
    return _File.model_validate({**data, "name": name, "size": size, "spec": {"name": name, **data["spec"]}})
