"""The store of what experts specialise on: one row for each validation, and its shares (OLMoE, eq. 7) when somebody asks.

A row that a dead attempt wrote past the checkpoint its successor went on from stays, but is no longer read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from django.db.models import Exists, OuterRef, QuerySet
from django.db.models.functions import Coalesce
from numpy.typing import NDArray

from experiments.models.telemetry import Specialisation, SpoolCursor
from experiments.telemetry import payload
from spec.events import SpecialisationCounted


def keep(run_id: int, attempt: int, event: SpecialisationCounted) -> None:
    """Stores a count. Of two for the same step of an attempt the later one counts."""
    packed = [payload.encode_rows(np.ascontiguousarray(array)[None])[0] for array in (event.class_tokens, event.domain_tokens)]
    Specialisation.objects.bulk_create(
        [
            Specialisation(
                run_id=run_id,
                attempt=attempt,
                step=event.step,
                at=datetime.fromtimestamp(event.at, UTC),
                classes=[[name, total] for name, total in event.classes.items()],
                domains=[[name, total] for name, total in event.domains.items()],
                shape=list(event.class_tokens.shape[:2]),
                class_tokens=packed[0],
                domain_tokens=packed[1],
            )
        ],
        update_conflicts=True,
        unique_fields=["run_id", "attempt", "step"],
        update_fields=["at", "classes", "domains", "shape", "class_tokens", "domain_tokens"],
    )


def counted(run_id: int) -> QuerySet[Specialisation]:
    """The run's rows that count, newest step first, without their payloads."""
    later = SpoolCursor.objects.filter(run_id=run_id, attempt__gt=OuterRef("attempt"), started=True)
    undone = later.annotate(kept=Coalesce("resumed_from_step", -1)).filter(kept__lt=OuterRef("step"))
    return Specialisation.objects.filter(~Exists(undone), run_id=run_id).order_by("-step", "-attempt").defer("class_tokens", "domain_tokens")


def steps(run_id: int) -> list[int]:
    """The steps after which there are counts, newest first."""
    return list(counted(run_id).order_by("-step").values_list("step", flat=True).distinct())


@dataclass(frozen=True)
class Group:
    """A class of tokens or a domain: its name, its tokens in the validation, and how many each expert of the layer took, int64[E]."""

    name: str
    tokens: int
    taken: NDArray[np.int64]

    @property
    def share(self) -> NDArray[np.float64]:
        """float64[E]: N(expert, group) / N(group)."""
        return self.taken / self.tokens


@dataclass(frozen=True)
class Layer:
    """One layer at one validation. Groups that the validation's text lacks are left out."""

    step: int
    row: int
    classes: list[Group]
    domains: list[Group]


def layer(run_id: int, step: int, row: int) -> Layer | None:
    """The counts of the `row`-th MoE layer after `step`; None where the store has none."""
    found = counted(run_id).filter(step=step).defer(None).first()
    if found is None or not 0 <= row < found.shape[0]:
        return None
    groups = [_groups(found.shape, names, data, row) for names, data in ((found.classes, found.class_tokens), (found.domains, found.domain_tokens))]
    return Layer(step, row, *groups)


def _groups(shape: list[int], names: list[Any], data: bytes | memoryview, row: int) -> list[Group]:
    layers, experts = shape
    cells = experts * len(names)
    values = payload.decode_rows([bytes(data)], layers * cells, slice(row * cells, (row + 1) * cells))[0]
    taken = values.reshape(experts, len(names)).astype(np.int64)
    return [Group(name, total, taken[:, i]) for i, (name, total) in enumerate(names) if total]
