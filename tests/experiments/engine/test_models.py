"""The database's own rules about runs."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.db import IntegrityError, transaction

from experiments.models import TERMINAL, Project, Run, State

pytestmark = pytest.mark.django_db


@pytest.fixture
def run() -> Run:
    return Run.objects.create(project=Project.default(), owner=User.objects.create_user("ada"), name="one")


@pytest.mark.parametrize("end", sorted(TERMINAL))
@pytest.mark.parametrize("after", State.values)
def test_an_ended_run_keeps_its_state_even_against_plain_sql(run: Run, end: str, after: str) -> None:
    Run.objects.filter(pk=run.pk).update(state=end)
    if after == end:
        Run.objects.filter(pk=run.pk).update(state=after)
        return
    with pytest.raises(IntegrityError, match="has ended as"), transaction.atomic():
        Run.objects.filter(pk=run.pk).update(state=after)
    run.refresh_from_db()
    assert run.state == end


def test_attempts_never_count_down(run: Run) -> None:
    Run.objects.filter(pk=run.pk).update(attempt=2)
    with pytest.raises(IntegrityError, match="fall from 2 to 1"), transaction.atomic():
        Run.objects.filter(pk=run.pk).update(attempt=1)


def test_a_state_that_is_not_one_is_refused(run: Run) -> None:
    with pytest.raises(IntegrityError, match="run_state_known"), transaction.atomic():
        Run.objects.filter(pk=run.pk).update(state="asleep")
