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


REFUSED = [
    ("devices=8&replicas=12", "replicas", "replicas 12 is not a multiple of devices 8"),
    ("devices=8&nodes=3", "nodes", "nodes 3 does not divide devices 8"),
    ("devices=4&replicas=8", "replicas", "replicas 8 < 12 experts"),
    ("groups=5", "groups", "groups 5 does not divide the 12 experts"),
    ("devices=0", "devices", "greater than or equal to 1"),
    ("devices=4097", "devices", "less than or equal to 4096"),
    ("replicas=65537", "replicas", "less than or equal to 65536"),
    ("nodes=-1", "nodes", "greater than or equal to 1"),
    ("devices=x", "devices", "a valid integer"),
    ("from=20&to=10", "from", "from 20 is after to 10"),
    ("to=99999999999", "to", "less than 2147483648"),
]


@pytest.mark.parametrize(("query", "parameter", "detail"), REFUSED)
def test_what_does_not_fit_is_refused_with_its_name(measured: Run, client: Client, query: str, parameter: str, detail: str) -> None:
    answer = api(measured).get(f"/api/v1/runs/{measured.pk}/placement?{query}")
    assert answer.status_code == 400
    [error] = answer.json()["errors"]
    assert error["parameter"] == parameter and detail in error["detail"] and detail in answer.json()["detail"]
    client.force_login(measured.owner)
    page = client.get(f"/runs/{measured.pk}/panel/placement?{query}")
    said = {number.name: number.error for number in page.context["numbers"]}
    assert said.pop(parameter) == error["detail"] and not any(said.values())
    typed = dict(part.split("=") for part in query.split("&"))
    assert {number.name: number.value for number in page.context["numbers"] if number.value} == typed, "what was typed stays"
    assert f'id="place-{parameter}-error" role="alert"' in page.content.decode() and "made" not in page.context


def test_what_is_no_parameter_is_refused_and_steps_without_load_are_not_found(measured: Run, client: Client) -> None:
    answer = api(measured).get(f"/api/v1/runs/{measured.pk}/placement?experts=4")
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (400, "experts")
    assert api(measured).get(f"/api/v1/runs/{measured.pk}/placement?from=200&to=300").status_code == 404
    client.force_login(measured.owner)
    assert 'role="alert">experts: ' in client.get(f"/runs/{measured.pk}/panel/placement?experts=4").content.decode()


def test_as_many_places_as_there_are_experts_in_the_load(measured: Run) -> None:
    Run.objects.filter(pk=measured.pk).update(n_experts=2 * E)  # what a run said of itself last need not be what it counted
    assert api(measured).get(f"/api/v1/runs/{measured.pk}/placement").json()["replicas"] == E


def test_too_many_slots_are_refused(measured: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.telemetry.placement.MAX_SLOTS", 20)
    answer = api(measured).get(f"/api/v1/runs/{measured.pk}/placement")
    assert answer.status_code == 400
    assert "replicas 12 in 2 layers are 24 slots; the limit is 20" in answer.json()["errors"][0]["detail"]


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
    assert "layer 99 &gt; 1" in client.get(f"/runs/{measured.pk}/panel/placement?layer=99").content.decode()


def test_the_page_of_a_run_without_loads(run: Run, client: Client) -> None:
    client.force_login(run.owner)
    assert "No expert has taken a token" in client.get(f"/runs/{run.pk}/panel/placement").content.decode()
