"""What the pages say of routers whose figures do not compare."""

from __future__ import annotations

import html

import pytest

from experiments.actions.submit import submit
from experiments.models import Project, Role
from experiments.pages.notices import ROUTER_NOTICES, router_notice
from spec.experiment import ExperimentSpec
from tests.experiments.engine import people
from tests.frontend.test_pages import signed_in


@pytest.mark.django_db
@pytest.mark.parametrize("kind", ["topk_softmax", *ROUTER_NOTICES])
def test_the_run_page_warns_of_routers_that_see_the_future_or_learn_nothing(kind: str) -> None:
    moe = {"router": {"kind": kind}, "balance": []}
    spec = ExperimentSpec.model_validate({**people.TINY, "model": {**people.TINY.get("model", {}), "moe": moe}})
    run = submit(user=people.ada(), project=Project.default(), spec=spec)
    page = html.unescape(signed_in("ada", Role.EDITOR).get(f"/runs/{run.pk}").content.decode())
    assert ('id="router-notice"' in page) is (kind in ROUTER_NOTICES)
    assert ROUTER_NOTICES.get(kind, "") in page


def test_runs_without_a_router_need_no_notice() -> None:
    for spec in ({}, {"model": None}, {"model": {"moe": None}}, {"model": {"moe": {"router": None}}}):
        assert router_notice(spec) == ""


@pytest.mark.django_db
def test_the_form_says_the_same_beside_the_choice() -> None:
    page = html.unescape(signed_in("ada", Role.EDITOR).get("/runs/new").content.decode())
    assert "sees future tokens" in page and "no learned router" in page
