"""Placement by the load of a window of steps: over REST, on the command line, on the page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from django.test import Client

from experiments.models import Run
from spec.events import RunStarted, StepDone
from spec.placement import place, plain
from tests.experiments.telemetry.conftest import declared, person, step, token_of
from tests.experiments.telemetry.test_store import send

L, E = 2, 12
SPEC = {"parallel": {"expert": 4}, "model": {"moe": {"router": {"n_groups": 4}}}}


def loaded(number: int) -> StepDone:
    rng = np.random.default_rng(number)
    counts = {"expert_tokens": (rng.exponential(1, (L, E)) * 1000).astype(np.uint32)}
    return StepDone(number, 1.7e9 + number, np.zeros(2, np.float32), counts)


def sum_of(first: int, last: int) -> Any:
    return sum(loaded(number).tensors["expert_tokens"].astype(np.float64) for number in range(first, last + 1))


@pytest.fixture
def measured(run: Run) -> Run:
    start = RunStarted(attempt=1, at=1.7e9, moe_layers=[1, 3], n_experts=E, top_k=1, steps=1000)
    send(run, [start, declared(), *(loaded(number) for number in range(1, 151))])
    Run.objects.filter(pk=run.pk).update(spec=SPEC)
    return Run.objects.get(pk=run.pk)


def api(run: Run) -> Client:
    return Client(headers={"authorization": f"Bearer {token_of(run.owner, 'read')}"})


def test_rest_places_by_the_load_of_the_window(measured: Run) -> None:
    found = api(measured).get(f"/api/v1/runs/{measured.pk}/placement?devices=8&replicas=16&nodes=2&from=20&to=40").json()
    load_LE = sum_of(20, 40)
    wanted = place(load_LE, 16, 4, 2, 8)
    assert (found["from"], found["to"], found["steps"], found["policy"]) == (20, 40, 21, "hierarchical")
    assert [layer["layer"] for layer in found["layers"]] == [1, 3]
    for row, layer in enumerate(found["layers"]):
        assert layer["device_experts"] == [wanted.on_device(row, device) for device in range(8)]
        assert layer["copies"] == wanted.copies_LE[row].tolist()
        np.testing.assert_allclose(layer["load_after"], wanted.device_load(load_LE)[row])
        assert layer["load_before"] is None, "12 experts are no equal parts on 8 devices"
        assert layer["balance_after"] == pytest.approx(np.mean(layer["load_after"]) / max(layer["load_after"]))
    assert found["balance_after"] == pytest.approx(np.mean([layer["balance_after"] for layer in found["layers"]]))


def test_what_is_not_asked_for_is_the_run_s_own(measured: Run) -> None:
    found = api(measured).get(f"/api/v1/runs/{measured.pk}/placement").json()
    assert {name: found[name] for name in ("from", "to", "devices", "replicas", "nodes", "groups")} == {
        "from": 51,
        "to": 150,
        "devices": 4,
        "replicas": 12,
        "nodes": 1,
        "groups": 4,
    }
    before = plain(L, E, 4).device_load(sum_of(51, 150))
    np.testing.assert_allclose([layer["load_before"] for layer in found["layers"]], before)
    assert found["balance_after"] >= found["balance_before"]


def test_a_long_window_is_read_from_roll_ups(measured: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.telemetry.read.MAX_POINTS", 10)
    found = api(measured).get(f"/api/v1/runs/{measured.pk}/placement?devices=1&replicas=12&from=3&to=140").json()
    assert (found["from"], found["to"], found["steps"]) == (0, 150, 150), "bucket 0 holds step 0 too"
    assert found["layers"][0]["load_after"] == [sum_of(1, 150)[0].sum()]


@pytest.mark.parametrize(
    ("query", "status", "detail"),
    [
        ("devices=8&replicas=12", 400, "replicas 12 is not a multiple of devices 8"),
        ("devices=8&nodes=3", 400, "nodes 3 does not divide devices 8"),
        ("devices=4&replicas=8", 400, "replicas 8 < 12 experts"),
        ("groups=5", 400, "groups 5 does not divide the 12 experts"),
        ("devices=0", 400, "devices"),
        ("replicas=65537", 400, "replicas"),
        ("devices=x", 400, "devices"),
        ("experts=4", 400, "experts"),
        ("from=200&to=300", 404, "no expert loads in these steps"),
    ],
)
def test_what_does_not_fit_is_refused(measured: Run, query: str, status: int, detail: str) -> None:
    answer = api(measured).get(f"/api/v1/runs/{measured.pk}/placement?{query}")
    assert (answer.status_code, detail in answer.content.decode()) == (status, True), answer.content


def test_too_many_slots_are_refused(measured: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.telemetry.placement.MAX_SLOTS", 20)
    answer = api(measured).get(f"/api/v1/runs/{measured.pk}/placement")
    assert answer.status_code == 400
    assert "replicas 12 in 2 layers are 24 slots; the limit is 20" in answer.json()["detail"]


def test_runs_without_loads_and_outsiders(run: Run) -> None:
    send(run, [RunStarted(attempt=1, at=1.7e9, steps=10), declared(), step(1, tensors=False)])
    assert api(run).get(f"/api/v1/runs/{run.pk}/placement").status_code == 404
    outsider = Client(headers={"authorization": f"Bearer {token_of(person('outsider'), 'read')}"})
    assert outsider.get(f"/api/v1/runs/{run.pk}/placement").json()["status"] == 404
    assert Client().get(f"/api/v1/runs/{run.pk}/placement").status_code == 401


def test_the_page_shows_who_holds_what(measured: Run, client: Client) -> None:
    client.force_login(measured.owner)
    page = client.get(f"/runs/{measured.pk}/panel/placement?devices=4&replicas=16&layer=1&from=1&to=10")
    made = place(sum_of(1, 10), 16, 4, 1, 4)
    assert [[expert for expert, _ in device["experts"]] for device in page.context["devices"]] == [made.on_device(1, device) for device in range(4)]
    assert '<option value="1" selected>3</option>' in page.content.decode()
    assert "replicas 16 is not a multiple of devices 3" in client.get(f"/runs/{measured.pk}/panel/placement?devices=3&replicas=16").content.decode()
    assert client.get(f"/runs/{measured.pk}/panel/placement?devices=x&layer=99&from=-1&to=99999999999").status_code == 200


def test_the_page_of_a_run_without_loads(run: Run, client: Client) -> None:
    client.force_login(run.owner)
    assert "No expert has taken a token" in client.get(f"/runs/{run.pk}/panel/placement").content.decode()
