"""The pages as the server writes them: the policy on every answer, hostile names as text, roles, and a form without gaps."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from experiments.actions.claim import claim
from experiments.actions.submit import submit
from experiments.models import Project, Role, Run
from experiments.pages import workers
from experiments.pages.csp import POLICY
from experiments.pages.form import Choice, Field, Group, Terms, sections, spec_form
from spec.experiment import ExperimentSpec
from spec.methods import methods
from tests.experiments.engine import people

pytestmark = pytest.mark.django_db
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "'-alert(1)-'",
    "</script><script>alert(1)</script>",
    "{{7*7}}{% debug %}",
    "javascript:alert(1)",
]
PAGES = [
    "/runs",
    "/runs/new?from={id}",
    "/runs/{id}",
    "/runs/{id}/row",
    "/runs/{id}/panel/spec",
    "/runs/{id}/panel/timeline",
    "/runs/{id}/panel/checkpoints",
]
PAGES += ["/runs/compare?id={id}&id={id}", "/workers", "/tokens", "/presets", "/presets/nano-mixtral", "/methods", "/api/v1/docs"]


def signed_in(name: str, role: str | None = None) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(people.user(name, Project.default(), role))
    return client


def hostile_run(text: str) -> Run:
    spec = ExperimentSpec.model_validate({**people.TINY, "name": text})
    run = submit(user=people.ada(), project=Project.default(), spec=spec, tags=[text[:64]], notes=text)
    Run.objects.filter(pk=run.pk).update(detail=text, reason=text[:64])
    return run


@pytest.mark.parametrize(
    "path", ["/runs", "/login", "/nowhere", "/api/v1/runs", "/api/v1/nowhere", "/healthz", "/logout", "/runs/99999999999999999999"]
)
def test_the_policy_is_on_every_answer_and_allows_nothing_unsafe(path: str) -> None:
    for client in (Client(raise_request_exception=False), signed_in("ada", Role.EDITOR)):
        assert client.get(path).headers["Content-Security-Policy"] == POLICY
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_is_text_on_every_page(text: str) -> None:
    run, client = hostile_run(text), signed_in("ada", Role.EDITOR)
    for path in PAGES:
        answer = client.get(path.format(id=run.pk))
        assert answer.status_code == 200, path
        body = answer.content.decode()
        assert "<img src=x" not in body and "<script>alert" not in body and "</script><script>" not in body, path
        assert " style=" not in body and "onclick" not in body, path


def test_a_viewer_sees_a_run_without_its_buttons_and_an_outsider_sees_none() -> None:
    run = hostile_run("a run")
    editor, viewer, outsider = signed_in("ada", Role.EDITOR), signed_in("vic", Role.VIEWER), signed_in("olga")
    assert b"data-action" in editor.get(f"/runs/{run.pk}").content
    seen = viewer.get(f"/runs/{run.pk}")
    assert seen.status_code == 200 and b"data-action" not in seen.content
    for path in (f"/runs/{run.pk}", f"/runs/{run.pk}/row", f"/runs/{run.pk}/panel/spec", f"/runs/new?from={run.pk}"):
        assert outsider.get(path).status_code == 404, path
    assert b"a run" not in outsider.get(f"/runs/compare?id={run.pk}&id={run.pk}").content


def test_filters_of_the_list_are_the_api_s_and_nonsense_is_said() -> None:
    hostile_run("alpha")
    hostile_run("beta")
    client = signed_in("ada", Role.EDITOR)
    assert b"alpha" in client.get("/runs?q=alp").content and b"beta" not in client.get("/runs?q=alp").content
    assert b"alpha" not in client.get("/runs?state=running&tag=&metric=").content
    answer = client.get("/runs?metric=nonsense")
    assert answer.status_code == 400 and b"must look like" in answer.content
    assert client.get("/runs?cursor=nonsense").status_code == 200


def test_whose_runs_are_all_archived_is_shown_the_way_to_them() -> None:
    client = signed_in("ada", Role.EDITOR)
    assert b"data-first" in client.get("/runs").content
    hostile_run("alpha")
    Run.objects.update(archived=True)
    shown = client.get("/runs").content
    assert b"data-first" not in shown and b'href="/runs?archived=true"' in shown
    assert b"alpha" in client.get("/runs?archived=true").content


def test_signing_in_leads_only_to_our_own_pages() -> None:
    people.user("ada", Project.default(), Role.EDITOR)
    for target, leads in (
        ("/runs/new", "/runs/new"),
        ("https://elsewhere.example/", "/runs"),
        ("//elsewhere.example", "/runs"),
        ("javascript:alert(1)", "/runs"),
    ):
        answer = Client().post("/login", {"username": "ada", "password": people.PASSWORD, "next": target})
        assert (answer.status_code, answer.headers["Location"]) == (302, leads)


def test_the_form_has_a_field_for_every_value_of_the_spec() -> None:
    found = {f"{path}" for part in [Group("", "", "", spec_form().fields), *sections()] for path in _paths(part)}
    assert set(_leaves(ExperimentSpec().model_dump(mode="json"), "")) <= found


def _paths(part: Group | Choice | Terms | Field) -> list[str]:
    if isinstance(part, Field):
        return [part.path]
    if isinstance(part, Group):
        return [*([part.path] if part.optional else []), *(path for child in [*part.fields, *part.parts] for path in _paths(child))]
    return [part.path, f"{part.path}.kind", *(path for _, variant in part.variants for path in _paths(variant))]


def _leaves(value: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [path]
    return [leaf for key, child in value.items() for leaf in _leaves(child, f"{path}.{key}" if path else key)]


# ----- presets and methods


def test_a_preset_says_which_active_figure_is_published_and_what_differs() -> None:
    page = signed_in("ada").get("/presets/deepseek-v3").content.decode()
    assert "671B, 36.7B active: without the input embedding" in page and "11,610,067,968" in page and "both embeddings" in page
    assert "counts the vision tower" in signed_in("ada").get("/presets/llama-4-scout").content.decode()


def test_a_method_opens_the_form_with_its_spec() -> None:
    client = signed_in("ada")
    page = client.get("/methods").content.decode()
    assert all(entry.name.replace("'", "&#x27;") in page and f"/runs/new?method={entry.key}" in page for entry in methods())
    opened = client.get("/runs/new?method=loss_free_bias")
    assert opened.context["initial"]["model"]["moe"]["balance"] == [{"kind": "loss_free_bias", "update_rate": 0.001}]
    assert client.get("/runs/new?method=nothing").status_code == 404


def test_an_editor_clones_within_the_runs_project_and_a_viewer_launches_in_a_project_of_his_own(db: None) -> None:
    run, mine = hostile_run("a run"), Project.objects.create(name="mine")
    editor, viewer = signed_in("ada", Role.EDITOR), signed_in("vic", Role.VIEWER)
    for name in ("ada", "vic"):
        people.user(name, mine, Role.EDITOR)
    cloned, copied = editor.get(f"/runs/new?from={run.pk}"), viewer.get(f"/runs/new?from={run.pk}")
    assert [project.name for project in cloned.context["projects"]] == ["default"] and f'data-parent="{run.pk}"' in cloned.content.decode()
    assert [project.name for project in copied.context["projects"]] == ["mine"] and "data-parent" not in copied.content.decode()


def test_a_run_leads_to_its_successors(db: None) -> None:
    dense = {**people.TINY, "model": {**people.TINY["model"], "d_ff": 32, "moe": None}}
    runs = [
        submit(user=people.ada(), project=Project.default(), spec=ExperimentSpec.model_validate(plain), tags=[]) for plain in (people.TINY, dense)
    ]
    Run.objects.update(state="succeeded")
    editor, outsider = signed_in("ada", Role.EDITOR), signed_in("olga")
    for run, offered in zip(runs, ({"fine-tuning", "baseline-flops", "baseline-params"}, {"fine-tuning", "upcycling"}), strict=True):
        shown = editor.get(f"/runs/{run.pk}").content.decode()
        for word in ("fine-tuning", "upcycling", "baseline-flops", "baseline-params"):
            path = f"/runs/new?from={run.pk}&as={word}"
            assert (path.replace("&", "&amp;") in shown) == (word in offered), word
            answer = editor.get(path)
            assert answer.status_code == (200 if word in offered else 404), word
            assert outsider.get(path).status_code == 404
            if word in offered:
                initial = ExperimentSpec.model_validate(answer.context["initial"])
                assert (initial.start.kind != "scratch") == (word in ("fine-tuning", "upcycling"))
                assert (initial.model.moe is None) == ("baseline" in word or (word == "fine-tuning" and run.spec["model"]["moe"] is None))
    for path in ("/runs/new?as=fine-tuning", f"/runs/new?from={runs[0].pk}&as=magic"):
        assert editor.get(path).status_code == 404
    Run.objects.update(spec={"model": {"colour": 1}})
    assert editor.get(f"/runs/new?from={runs[0].pk}&as=fine-tuning").status_code == 404
    assert editor.get(f"/runs/new?from={runs[0].pk}").status_code == 200


def test_a_dense_run_has_no_views_of_experts_and_a_recorded_run_may_yet_tell_of_some(db: None) -> None:
    dense = {**people.TINY, "model": {**people.TINY["model"], "d_ff": 32, "moe": None}}
    runs = [
        submit(user=people.ada(), project=Project.default(), spec=ExperimentSpec.model_validate(plain), tags=[]) for plain in (people.TINY, dense)
    ]
    recorded = Run.objects.create(project=Project.default(), owner=people.ada(), name="recorded", recorded=True, attempt=0)
    editor = signed_in("ada", Role.EDITOR)
    for run, experts in ((runs[0], True), (runs[1], False), (recorded, True)):
        shown = editor.get(f"/runs/{run.pk}").content.decode()
        for part in ('id="tab-placement"', 'id="panel-specialisation"', 'data-stat="max_vio"', 'data-stat="dead_experts"'):
            assert (part in shown) == experts, (run.name, part)
        assert 'id="panel-timeline"' in shown and 'data-stat="grad_norm"' in shown
    for ours in ('data-action="pause"', 'data-action="restart"', 'data-action="clone"', f"?from={recorded.pk}", f"/runs/{recorded.pk}/generate"):
        assert ours not in shown, "an outside trainer makes it: what only ours can do is not offered"
    assert 'data-action="cancel"' in shown and 'id="edit-open"' in shown


def test_a_run_on_several_hosts_names_them_and_each_host_the_run() -> None:
    run = submit(
        user=people.ada(), project=Project.default(), spec=ExperimentSpec.model_validate({**people.TINY, "parallel": {"data": 2, "nodes": 2}})
    )
    for worker in [people.worker(name) for name in ("first-host", "second-host")]:
        claim(Run.objects.all(), worker=worker, free_slots=1, free_devices=["cpu:0"])
    client = signed_in("ada", Role.EDITOR)
    shown = client.get(f"/runs/{run.pk}").content.decode()
    assert "node 0 on first-host (cpu:0)" in shown and "node 1 on second-host (cpu:0)" in shown
    assert client.get("/workers").content.decode().count(f'href="/runs/{run.pk}"') == 2


# ----- what is not there, broken, or not yet begun


def test_an_error_page_says_what_was_asked_for_and_keeps_the_theme(monkeypatch: pytest.MonkeyPatch) -> None:
    client = signed_in("ada", Role.EDITOR)
    missing = client.get("/runs/999/<b>").content.decode()
    assert "<code>/runs/999/%3Cb%3E</code>" in missing and "<title>Not found · moelab</title>" in missing
    client.cookies["theme"] = "light"

    def fail(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(workers, "visible_runs", fail)
    answer = client.get("/workers")
    assert answer.status_code == 500 and 'data-theme="light"' in answer.content.decode() and "training goes on" in answer.content.decode()


def test_a_queued_run_says_what_it_waits_for() -> None:
    run = submit(
        user=people.ada(), project=Project.default(), spec=ExperimentSpec.model_validate({**people.TINY, "parallel": {"device": "cuda", "data": 2}})
    )
    client = signed_in("ada", Role.EDITOR)

    def said() -> str:
        first = str(client.get(f"/runs/{run.pk}").context["page_data"]["waits_for"])
        assert client.get(f"/runs/{run.pk}/panel/waiting").content.decode() == first
        return first

    assert said().startswith("No worker is connected")
    people.worker("small", cuda=1)
    assert said() == "The run takes 2 CUDA devices on a host, and no worker that is connected has more than 1."
    large = people.worker("large", cuda=2)
    assert said() == "Waiting for a worker with free devices."
    Run.objects.filter(pk=run.pk).update(worker=large, progress_checkpoint_step=10)
    assert said() == "Waiting for free devices on large: the worker that has the checkpoint that the run goes on from."
    Run.objects.filter(pk=run.pk).update(state="running")
    assert said() == ""


def test_a_run_that_tells_rarely_says_when_its_pictures_begin() -> None:
    spec = {**people.TINY, "telemetry": {"every": 15}}
    run = submit(user=people.ada(), project=Project.default(), spec=ExperimentSpec.model_validate(spec))
    shown = signed_in("ada", Role.EDITOR).get(f"/runs/{run.pk}").content.decode()
    assert shown.count("at step 15: this run tells every 15 steps (telemetry.every).") == 4
