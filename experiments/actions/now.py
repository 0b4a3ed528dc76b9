"""Times by PostgreSQL's clock, the only one that leases know."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db.models import DateTimeField, ExpressionWrapper, Value
from django.db.models.functions import Now


def after_now(seconds: float) -> ExpressionWrapper[Any]:
    """The database's present time and `seconds`, which may be negative."""
    return ExpressionWrapper(Now() + Value(timedelta(seconds=seconds)), output_field=DateTimeField())
