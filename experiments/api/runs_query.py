"""The query of the list of runs: filters, order, and the cursor that goes on where a page ended."""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

from django.db.models import Case, Expression, F, FloatField, Func, Q, QuerySet, TextField, Value, When
from django.db.models.functions import Cast, Coalesce
from django.db.models.lookups import Exact
from pydantic import AfterValidator, Field, StringConstraints

from experiments.api.endpoint import Query
from experiments.api.problems import wrong_parameter
from experiments.models import Run, State
from spec.text import clean_text

MAX_LIMIT = 200
Word = Annotated[str, StringConstraints(max_length=200), AfterValidator(clean_text)]
_CONDITION = re.compile(r"\s*([\w./ -]{1,200}?)\s*(<=|>=|<|>|=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)\s*")
_LOOKUPS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte", "=": "exact"}
_NEVER = float("inf")


class Condition(NamedTuple):
    """`loss<2`: the newest value of a metric, compared with a number."""

    metric: str
    lookup: str
    value: float


def _condition(text: str) -> str:
    if not (match := _CONDITION.fullmatch(text)) or float(match[3]) in (_NEVER, -_NEVER):
        raise ValueError("must look like loss<2, with one of < <= > >= = and a finite number")
    return text


def _state(name: str) -> str:
    name = "cancelled" if name == "canceled" else name
    if name not in State.values:
        raise ValueError(f"must be one of {', '.join(State.values)}")
    return name


Order = Literal["-created_at", "created_at", "name", "-name", "loss", "-loss"]


class RunsQuery(Query):
    """Filters of the list of runs; all must hold, and of several `state`s any."""

    state: list[Annotated[str, AfterValidator(_state)]] = Field(default_factory=list, max_length=9, description="States; may be given several times.")
    tag: list[Word] = Field(default_factory=list, max_length=20, description="Tags that the run must have, each of them.")
    q: Word = Field("", description="Text in the name, the notes or a tag, or a run's number.")
    metric: list[Annotated[Word, AfterValidator(_condition)]] = Field(
        default_factory=list, max_length=10, description="A condition on a metric's newest value: loss<2, max_vio>=0.5; val_loss is the best."
    )
    project: Word | None = Field(None, description="A project's name.")
    archived: bool = Field(False, description="Archived runs instead of the others.")
    starred: bool | None = Field(None, description="Only starred runs, or only the others.")
    parent: int | None = Field(None, ge=0, lt=2**63, description="Runs made from this one.")
    order: Order = Field("-created_at", description="loss is the newest lm_loss, or loss where a run tells no other.")
    limit: int = Field(50, ge=1, le=MAX_LIMIT)
    cursor: str | None = Field(None, max_length=1000, description="next_cursor of the page before.")

    def apply(self, runs: QuerySet[Run]) -> QuerySet[Run]:
        """The runs that pass the filters, in the order, behind the cursor."""
        runs = runs.filter(archived=self.archived)
        if self.state:
            runs = runs.filter(state__in=self.state)
        if self.tag:
            runs = runs.filter(tags__contains=self.tag)
        if self.project is not None:
            runs = runs.filter(project__name=self.project)
        if self.starred is not None:
            runs = runs.filter(starred=self.starred)
        if self.parent is not None:
            runs = runs.filter(parent=self.parent)
        if self.q:
            runs = runs.filter(_matches(self.q))
        for index, condition in enumerate(self.conditions()):
            name = f"metric_{index}"
            runs = runs.annotate(**{name: newest(condition.metric)}).filter(**{f"{name}__{condition.lookup}": condition.value})
        return self._ordered(runs)

    def conditions(self) -> list[Condition]:
        """The metric filters, parsed."""
        matches = [match for text in self.metric if (match := _CONDITION.fullmatch(text))]
        return [Condition(match[1], _LOOKUPS[match[2]], float(match[3])) for match in matches]

    def _ordered(self, runs: QuerySet[Run]) -> QuerySet[Run]:
        descending, name = self.order.startswith("-"), self.order.lstrip("-")
        # A run without a loss comes last either way round.
        never = Value(-_NEVER if descending else _NEVER, FloatField())
        runs = runs.annotate(place=Coalesce(newest("lm_loss"), newest("loss"), never) if name == "loss" else F(name))
        if self.cursor is not None:
            value, last_id = _read_cursor(self.cursor, self.order)
            side = "lt" if descending else "gt"
            runs = runs.filter(Q(**{f"place__{side}": value}) | Q(place=value, **{f"id__{side}": last_id}))
        return runs.order_by("-place", "-id") if descending else runs.order_by("place", "id")

    def cursor_after(self, run: Run) -> str:
        """The cursor of the page behind `run`, which `apply` has found."""
        place = run.place  # type: ignore[attr-defined]
        plain = place.isoformat() if isinstance(place, datetime) else str(place)
        return base64.urlsafe_b64encode(json.dumps([self.order, plain, run.pk]).encode()).decode().rstrip("=")


def newest(metric: str) -> Expression:
    """The newest value of a metric, or SQL's NULL. The name is a parameter of the query, never a part of it."""
    if metric == "val_loss":
        return F("best_val_loss")  # type: ignore[return-value]
    path = [F("summary"), Value(metric, TextField())]
    kind = Func(Func(*path, function="jsonb_extract_path"), function="jsonb_typeof", output_field=TextField())
    text = Func(*path, function="jsonb_extract_path_text", output_field=TextField())
    return Case(When(Exact(kind, Value("number")), then=Cast(text, FloatField())), default=None, output_field=FloatField())


def _matches(text: str) -> Q:
    found = Q(name__icontains=text) | Q(notes__icontains=text) | Q(tags__contains=[text])
    if text.isascii() and text.isdigit() and int(text) < 2**63:
        found |= Q(pk=int(text))
    return found


def _read_cursor(cursor: str, order: str) -> tuple[Any, int]:
    """Where the page before ended. Raises Problem (400) for what is no cursor of this order."""
    try:
        made_for, plain, last_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if made_for != order or type(last_id) is not int or not 0 <= last_id < 2**63 or type(plain) is not str:
            raise ValueError
        return _READERS[order.lstrip("-")](plain), last_id
    except (ValueError, TypeError, RecursionError):
        raise wrong_parameter("cursor", "cursor: is not one of this list and order; begin again without it") from None


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError
    return moment


_READERS = {"created_at": _moment, "name": clean_text, "loss": float}
