"""The bodies that the API takes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from experiments.actions.describe import Refused, below, resolve
from experiments.api.endpoint import Body
from spec import presets
from spec.experiment import ExperimentSpec
from spec.problems import Problem
from spec.storage import StorageURL
from spec.text import Name, Text, clean_name

Tag = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(clean_name)]
Tags = Annotated[list[Tag], Field(max_length=32)]
Slug = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Priority = Annotated[int, Field(ge=-1000, le=1000)]
RunId = Annotated[int, Field(ge=1, lt=2**63)]
Small = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Described(Body):
    """An experiment: a spec (partial is enough: the rest has defaults) or a preset's name, with single fields over it by dotted path."""

    spec: dict[str, Any] | None = None
    preset: str | None = Field(None, max_length=200)
    overrides: dict[str, Any] = Field(default_factory=dict, max_length=200)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.spec is None) == (self.preset is None):
            raise ValueError("send either spec or preset")
        return self

    def experiment(self) -> ExperimentSpec:
        """The spec. Raises Refused."""
        plain: Mapping[str, Any] = self.spec or {}
        if self.preset is not None:
            try:
                plain = presets.load(self.preset).model_dump(mode="json")
            except presets.UnknownPresetError as error:
                raise Refused(below("/preset", [Problem("", str(error))])) from error
        return resolve(plain, self.overrides)


class BaselineBody(Described):
    """An experiment whose dense baseline is wanted."""

    equal: Literal["flops", "params"] = Field("flops", description="What is to be equal: forward FLOPs per token, or active parameters.")


class CheckpointReference(Body):
    """A checkpoint of a run; without `step`, its newest."""

    run: RunId
    step: Small | None = None


class SubmitBody(Described):
    """A run to be queued."""

    name: Name | None = None
    project: Slug | None = None
    tags: Tags = []
    notes: Text = ""
    priority: Priority = 0
    validate_only: bool = False
    resume_from: CheckpointReference | None = None


class RecordBody(Body):
    """A run that an outside trainer makes."""

    name: Name
    project: Slug | None = None
    tags: Tags = []
    notes: Text = ""


class PatchBody(Body):
    """What may be changed of a run."""

    name: Name | None = None
    notes: Text | None = None
    tags: Tags | None = None
    starred: bool | None = None
    archived: bool | None = None
    priority: Priority | None = None


class CloneBody(Body):
    """Changes by dotted path; no value means none."""

    set: dict[str, Any] = Field(default_factory=dict, max_length=200)
    name: Name | None = None


class EmptyBody(Body):
    """Nothing: `{}` or no body."""


class BulkBody(Body):
    """One verb for many runs."""

    action: Literal["cancel", "archive"]
    ids: list[RunId] = Field(min_length=1, max_length=500)


class DeviceBody(Body):
    """A device of a worker."""

    kind: Literal["cpu", "cuda"]
    index: Small
    name: Name
    memory_bytes: Annotated[int, Field(ge=0, lt=2**63)]


class HelloBody(Body):
    """A worker and what it has."""

    name: Name
    host: Name
    pid: Small
    version: Annotated[str, StringConstraints(max_length=64), AfterValidator(clean_name)]
    devices: list[DeviceBody] = Field(max_length=4096)
    slots: Annotated[int, Field(ge=0, le=4096)]
    storage: StorageURL = Field("", description="The storage that it shares checkpoints in (MOELAB_CHECKPOINTS), without any secret.")


class ClaimBody(Body):
    """A worker's wish for work."""

    worker: RunId
    free_slots: Annotated[int, Field(ge=0, le=4096)]
    free_devices: list[Annotated[str, StringConstraints(pattern=r"^(cpu|cuda):[0-9]{1,4}$")]] = Field(max_length=4096)


class ProjectBody(Body):
    """A project to be made."""

    name: Slug


class MemberBody(Body):
    """A user's role in a project."""

    user: Annotated[str, StringConstraints(min_length=1, max_length=150), AfterValidator(clean_name)]
    role: Literal["viewer", "editor", "admin"]


class TokenBody(Body):
    """A token to be made; without `expires_at` it lives until it is revoked."""

    name: Name
    scopes: list[Literal["read", "write", "ingest", "worker", "admin"]] = Field(min_length=1, max_length=5)
    project: Slug | None = None
    expires_at: Annotated[datetime, Field(strict=False)] | None = None
