"""The reading endpoints and exports say what the store has, refuse nonsense, and hide what is not one's own."""

from __future__ import annotations

import csv
import io
import json
import threading
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from django.test import Client
from django.utils import timezone

from experiments.access import authenticate_token
from experiments.api.telemetry import _grown
from experiments.models import Run, Token
from experiments.telemetry import export, log
from experiments.telemetry.read import Facts
from experiments.telemetry.sparkline import sparklines
from spec import block, events
from tests.experiments.telemetry.conftest import NAMES, declared, person, started, step, token_of
from tests.experiments.telemetry.test_store import send

STEPS = {n: step(n) for n in range(1, 201)}


@pytest.fixture
def told(run: Run, valkey_url: str) -> Run:
    """A run with 200 steps, a spike and an evaluation."""
    spike = events.SpikeDetected(step=9, at=1.7e9, loss=9, median=1, deviation=1, score=8)
    send(run, [started(), declared(), *STEPS.values(), spike, events.EvalDone(step=200, at=1.7e9, loss=2)])
    return run


@pytest.fixture
def api(told: Run) -> Client:
    return Client(headers={"authorization": f"Bearer {token_of(told.owner, 'read')}"})


def get(api: Client, run: Run, rest: str, **headers: str) -> Any:
    return api.get(f"/api/v1/runs/{run.pk}/{rest}", headers=headers)


def test_steps(api: Client, told: Run) -> None:
    answer = get(api, told, "steps?from=10&to=19&scalars=lr&tensors=expert_tokens,router_prob&layer=1")
    header, arrays = block.decode(answer.content)
    assert (header["level"], header["from"], header["to"], header["total"], header["names"], header["layer"]) == (1, 10, 19, 10, ["lr"], 1)
    np.testing.assert_array_equal(arrays["expert_tokens"][:, 0], [STEPS[n].tensors["expert_tokens"][1] for n in range(10, 20)])
    np.testing.assert_array_equal(arrays["scalars"][:, 0], [STEPS[n].scalars[1] for n in range(10, 20)])
    header, arrays = block.decode(get(api, told, "steps?points=10").content)
    assert (header["level"], header["from"], header["to"], header["names"]) == (64, 0, 200, NAMES)
    header, arrays = block.decode(get(api, told, "steps?from=300").content)
    assert (header["total"], len(arrays["step"])) == (0, 0)


def test_routing_as_block_and_as_json(api: Client, told: Run) -> None:
    header, arrays = block.decode(get(api, told, "routing?step=7").content)
    np.testing.assert_array_equal(arrays["expert_tokens"][0], STEPS[7].tensors["expert_tokens"])
    plain = get(api, told, "routing?step=7", accept="application/json").json()
    assert plain["expert_tokens"] == arrays["expert_tokens"].tolist()
    assert plain["step"] == [7]


def test_metrics(api: Client, told: Run) -> None:
    listed = {item["name"]: item for item in get(api, told, "metrics").json()["items"]}
    losses = np.array([STEPS[n].scalars[0] for n in STEPS])
    assert listed["loss"]["count"] == np.isfinite(losses).sum()
    assert listed["loss"]["max"] == pytest.approx(np.nanmax(losses))
    exact = get(api, told, "metrics/loss?exact=1&from=5&to=9").json()
    assert exact["values"][2] is None
    assert exact["values"][0] == pytest.approx(STEPS[5].scalars[0])
    sampled = get(api, told, "metrics/loss?points=4").json()
    assert (sampled["sampled"], sampled["level"], sampled["total"]) == (True, 64, 200)
    assert sampled["min"][0] == pytest.approx(np.nanmin(losses[:64]))
    assert get(api, told, "metrics/none").status_code == 404


def test_events_by_page_and_kind(api: Client, told: Run) -> None:
    first = get(api, told, "events?limit=2").json()
    rest = get(api, told, f"events?limit=2&cursor={first['next_cursor']}").json()
    assert [item["kind"] for item in first["items"] + rest["items"]] == ["run_started", "spike_detected", "eval_done"]
    assert rest["next_cursor"] is None
    assert [item["step"] for item in get(api, told, "events?kind=spike_detected").json()["items"]] == [9]
    assert get(api, told, "events?newest_first=true&limit=1").json()["items"][0]["kind"] == "eval_done"


def test_the_log_in_parts(api: Client, told: Run) -> None:
    log.append(told.pk, 1, 0, "hällo\n".encode() * 10)
    answer = get(api, told, "logs?offset=2&limit=5")
    assert answer.content == "hällo\n".encode()[2:7]
    assert (answer.headers["X-Next-Offset"], answer.headers["X-Log-Size"]) == ("7", "70")
    assert get(api, told, "logs?offset=-7").content == "hällo\n".encode()


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
def test_the_log_as_it_grows(api: Client, told: Run) -> None:
    log.append(told.pk, 1, 0, "eins ä".encode()[:-1])

    def grow() -> None:
        log.append(told.pk, 1, 6, "ä zwei".encode()[1:])
        Run.objects.filter(pk=told.pk).update(state="succeeded")

    timer = threading.Timer(0.5, grow)
    timer.start()
    said = b"".join(get(api, told, "logs/follow")).decode()
    timer.join()
    datas = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]
    assert "".join(data.get("text", "") for data in datas) == "eins ä zwei"
    assert datas[0] == {"offset": 0, "text": "eins "}
    assert "event: end" in said


@pytest.mark.parametrize("end", ["revoked", "inactive"])
def test_the_log_is_followed_no_longer_than_one_may(told: Run, end: str) -> None:
    log.append(told.pk, 1, 0, b"seen")
    principal = authenticate_token(token_of(told.owner, "read"))
    assert principal is not None and _grown(principal, told.pk, 0) == (b"seen", False)
    if end == "revoked":
        Token.objects.filter(pk=principal.token_id).update(revoked_at=timezone.now())
    else:
        type(told.owner).objects.filter(pk=told.owner.pk).update(is_active=False)
    assert _grown(principal, told.pk, 0) is None


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("file", sorted(export.FORMATS))
def test_an_export_equals_the_store(api: Client, told: Run, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "STEPS_AT_ONCE", 64)
    monkeypatch.setattr(export, "LOG_BYTES_AT_ONCE", 7)
    log.append(told.pk, 1, 0, b"printed by the trainer\n" * 3)
    answer = get(api, told, f"export/{file}")
    assert file in answer.headers["Content-Disposition"]
    data = b"".join(answer)
    scalars = np.array([STEPS[n].scalars for n in STEPS])
    tokens = np.array([STEPS[n].tensors["expert_tokens"] for n in STEPS])
    if file == "metrics.csv":
        lines = list(csv.reader(io.StringIO(data.decode())))
        assert lines[0] == ["step", "at", "attempt", *NAMES]
        assert [int(line[0]) for line in lines[1:]] == list(STEPS)
        np.testing.assert_allclose([[float(cell or "nan") for cell in line[3:]] for line in lines[1:]], scalars, rtol=1e-6)
    elif file == "metrics.jsonl":
        objects = [json.loads(line) for line in data.splitlines()]
        assert [item["step"] for item in objects] == list(STEPS)
        values = [[np.nan if item["metrics"][name] is None else item["metrics"][name] for name in NAMES] for item in objects]
        np.testing.assert_allclose(values, scalars, rtol=1e-6)
    elif file == "metrics.parquet":
        table = pq.read_table(io.BytesIO(data))
        np.testing.assert_array_equal(np.stack([table[f"metrics/{name}"].to_numpy() for name in NAMES], axis=1), scalars)
        assert table["step"].to_pylist() == list(STEPS)
    elif file == "routing.parquet":
        table = pq.read_table(io.BytesIO(data))
        assert table["layer"].to_pylist()[:4] == [0, 1, 0, 1]
        np.testing.assert_array_equal(np.array(table["expert_tokens"].to_pylist()).reshape(tokens.shape), tokens)
    elif file == "log.txt":
        assert data == b"printed by the trainer\n" * 3
    else:
        arrays = np.load(io.BytesIO(data))
        np.testing.assert_array_equal(arrays["expert_tokens"], tokens)
        assert arrays["step"].tolist() == list(STEPS)
        assert not arrays["dropped"].any()


def test_a_run_without_a_step_exports_too(run: Run) -> None:
    for file, (_, make) in export.FORMATS.items():
        assert bool(b"".join(make(Facts.of(run)))) is (file not in ("metrics.jsonl", "log.txt"))


@pytest.mark.parametrize(
    "rest",
    [
        "steps?from=-1",
        "steps?to=x",
        "steps?points=0",
        "steps?points=2001",
        "steps?scalars=nothing",
        "steps?tensors=nothing",
        "steps?layer=-1",
        "steps?layer=2&tensors=expert_tokens",
        "routing?layer=2",
        "steps?from=10&to=9",
        "steps?from=99999999999",
        "steps?what=1",
        "routing?step=1&from=2",
        "metrics/loss?exact=maybe",
        "events?cursor=abc",
        "events?limit=9999",
        "events?kind=%00",
        "logs?limit=0",
        "logs?offset=9e9",
        "logs/follow?offset=x",
    ],
)
def test_nonsense_is_refused_with_its_name(api: Client, told: Run, rest: str) -> None:
    answer = get(api, told, rest)
    assert answer.status_code == 400, answer.content
    assert answer.headers["Content-Type"] == "application/problem+json"
    [error] = answer.json()["errors"]
    assert f"{error['parameter']}=" in rest and error["detail"].startswith(error["parameter"])


def test_others_see_nothing(told: Run) -> None:
    stranger = Client(headers={"authorization": f"Bearer {token_of(person('stranger'), 'read')}"})
    sender = Client(headers={"authorization": f"Bearer {token_of(told.owner, 'ingest')}"})
    for rest in ("steps", "routing", "metrics", "metrics/loss", "events", "logs", "logs/follow", "export/metrics.csv"):
        assert get(stranger, told, rest).status_code == 404, rest
        assert get(sender, told, rest).status_code == 403, rest
        assert get(Client(), told, rest).status_code == 401, rest


def test_sparklines(told: Run) -> None:
    line = sparklines([told.pk, told.pk + 1])
    assert line[told.pk + 1] == []
    assert 30 <= len(line[told.pk]) <= 40
    assert line[told.pk][0] == pytest.approx(STEPS[1].scalars[0])
    assert line[told.pk][-1] == pytest.approx(STEPS[200].scalars[0])


def test_the_sparkline_of_a_run_that_tells_rarely_has_the_steps_that_it_told(run: Run, valkey_url: str) -> None:
    Run.objects.filter(pk=run.pk).update(spec={"telemetry": {"every": 500}})
    told = [*range(500, 20_001, 500), 20_123]
    send(run, [started(), declared(), *(step(number) for number in told)])
    line = sparklines([run.pk])[run.pk]
    assert line == pytest.approx([step(number).scalars[0] for number in told if np.isfinite(step(number).scalars[0])])
