"""1,500 requests made from the OpenAPI document by schemathesis, valid and not: no 5xx, and no answer that the document does not know.

Its example-based generator is driven by hand, so that the number of requests is exact, the seed fixed and the database real.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import schemathesis
from django.core.handlers.wsgi import WSGIHandler
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from experiments.actions.claim import claim
from experiments.actions.token import issue
from experiments.api.schema import openapi
from experiments.models import Run
from moelab.embedded import Valkey
from tests.experiments.engine import people

REQUESTS = 1500
pytestmark = pytest.mark.django_db(transaction=True)


def test_no_request_gets_a_5xx(valkey: Valkey) -> None:
    root = people.user("root", is_superuser=True)
    running, ended = people.queued(owner=root), people.queued(owner=root)
    claim(Run.objects.filter(pk=running.pk), worker=people.worker(), free_slots=1, free_devices=["cpu:0"])
    Run.objects.filter(pk=ended.pk).update(state="succeeded", summary={"loss": 1.0}, metric_names=["loss"])
    tokens = {kind: issue(user=root, name=kind, scopes=[kind]).secret for kind in ("admin", "worker")}
    schema = schemathesis.openapi.from_dict(openapi())
    schema.app = WSGIHandler()
    operations = [result.ok() for result in schema.get_all_operations()]
    each = -(-REQUESTS // (2 * len(operations)))
    statuses: Counter[int] = Counter()
    wrong: list[str] = []

    def send(operation: Any, case: Any) -> None:
        if case.path.endswith("/follow"):
            case.path_parameters["run_id"] = ended.pk  # Of a run that has not ended the log is followed for ever.
        elif "run_id" in case.path_parameters and statuses.total() % 2:
            case.path_parameters["run_id"] = running.pk if statuses.total() % 4 == 1 else ended.pk
        if case.query and case.query.get("wait") in ("terminal", "change"):
            case.query["timeout"] = 0.1
        case.headers["Authorization"] = f"Bearer {tokens['worker' if '/worker/' in operation.path else 'admin']}"
        started = time.process_time()
        answer = case.call()
        statuses[answer.status_code] += 1
        said = f"{case.method} {case.formatted_path}: {answer.status_code}"
        if answer.status_code >= 500 or time.process_time() - started > 2:
            wrong.append(f"{said} {answer.text[:200]} {case.as_curl_command()[:500]}")
        if str(answer.status_code) not in operation.definition.raw["responses"]:
            wrong.append(f"{said} is not in the document")
        if answer.status_code >= 400 and answer.headers["content-type"][0] != "application/problem+json":
            wrong.append(f"{said} is {answer.headers['content-type']}")

    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @seed(7)
            @settings(max_examples=each, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            def fuzz(case: Any, operation: Any) -> None:
                send(operation, case)

            try:
                fuzz(operation=operation)
            except Unsatisfiable:
                continue  # An operation without a body or parameters has no invalid form.

    assert not wrong, "\n".join(sorted(set(wrong))[:40])
    assert statuses.total() >= REQUESTS, statuses
    assert min(statuses[200], statuses[422], statuses[400] + statuses[404]) > 20, f"the requests do not reach far: {statuses}"
