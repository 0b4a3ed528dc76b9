"""Who is waited for when a run gathers its hosts: workers whose token may have it."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext

from experiments.access import Principal, projects_of_workers, visible_runs
from experiments.actions.now import after_now
from experiments.actions.token import issue
from experiments.models import Node, Project, Role, Run, Token, Worker
from tests.experiments.engine import people
from tests.experiments.engine.conftest import Speak
from tests.experiments.engine.pairs import ask, has_waited, pair


@pytest.mark.django_db
class TestWhoMayBeAHost:
    """Ada's pair is in the default project; `one` may take it. What the other worker's token may see decides."""

    @staticmethod
    def token(user: User, scopes: list[str] | None = None, **fields: Any) -> Token:
        return issue(user=user, name="other", scopes=scopes or ["worker"], **fields).token

    def stays_alone(self, other: Token | None) -> bool:
        """Whether a worker that could wait with another for a pair takes a short run instead, though the pair has waited for long."""
        one, two = people.worker("one"), people.worker("two")
        Worker.objects.filter(pk=two.pk).update(token=other)
        wide, short = pair(), people.queued()
        has_waited(wide)
        found = ask(one)
        assert (found is None) == Node.objects.filter(run=wide).exists()
        return found is not None and found.run == short

    def test_a_worker_whose_token_sees_the_run(self) -> None:
        assert not self.stays_alone(self.token(people.user("ben", Project.default(), Role.EDITOR)))

    def test_a_worker_of_the_machines_owner(self) -> None:
        assert not self.stays_alone(self.token(people.user("root", is_superuser=True)))

    def test_one_who_only_views_or_is_outside(self) -> None:
        assert self.stays_alone(self.token(people.user("vic", Project.default(), Role.VIEWER)))

    def test_one_outside(self) -> None:
        assert self.stays_alone(self.token(people.user("olga")))

    def test_one_bound_to_another_project(self) -> None:
        assert self.stays_alone(self.token(people.user("root", is_superuser=True), project=Project.objects.create(name="other")))

    def test_one_whose_token_is_revoked_or_was_never_heard(self) -> None:
        token = self.token(people.ada())
        Token.objects.filter(pk=token.pk).update(revoked_at=after_now(-1))
        assert self.stays_alone(token)

    def test_one_that_has_not_spoken_since_tokens_are_remembered(self) -> None:
        assert self.stays_alone(None)

    def test_one_whose_token_may_do_anything_but_work(self) -> None:
        assert self.stays_alone(self.token(people.ada(), ["admin"]))

    def test_the_books_say_what_the_claim_would(self) -> None:
        """For every kind of token: the projects that the books know are those of which the claim's own query offers runs."""
        other = Project.objects.create(name="other")
        ada, root = people.user("ada", other, Role.VIEWER), people.user("root", is_superuser=True)
        people.user("ada", Project.default(), Role.EDITOR)
        runs = {project.pk: Run.objects.create(project=project, owner=ada, name="x") for project in (Project.default(), other)}
        tokens = [self.token(user, project=project) for user in (ada, root) for project in (None, Project.default(), other)]
        with CaptureQueriesContext(connection) as queries:
            known = projects_of_workers([token.pk for token in tokens])
        assert len(queries) == 3  # whatever number of tokens
        for token in tokens:
            principal = Principal(token.user, frozenset(token.scopes), token.project_id, token.pk)
            offered = set(visible_runs(principal, Role.EDITOR).values_list("project_id", flat=True))
            assert known[token.pk] == offered and offered <= set(runs)

    def test_a_worker_is_known_by_the_token_with_which_it_spoke_last(self, as_user: Speak) -> None:
        worker = people.worker("one")
        for verb, body in (("hello", HELLO), ("claim", {"worker": worker.pk, "free_slots": 1, "free_devices": ["cpu:0"]})):
            before = worker.token_id
            as_user(people.ada(), "worker").post(f"/api/v1/worker/{verb}", body, format="json")
            worker.refresh_from_db()
            assert worker.token and worker.token_id != before


HELLO = {"name": "one", "host": "one", "pid": 1, "version": "0", "devices": [], "slots": 1}
