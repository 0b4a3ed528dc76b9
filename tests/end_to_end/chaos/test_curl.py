"""A run from a shell script: nothing but curl, as the README shows it."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any, NamedTuple

import pytest

from tests.end_to_end.chaos.conftest import Lab

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def curl(lab: Lab, path: str, *options: str) -> Answer:
    """What curl prints with `--include`; the token goes through a file descriptor, not through the arguments."""
    command = ["curl", "--silent", "--show-error", "--include", "--config", "-", *options, f"{lab.client.server}/api/v1{path}"]
    config = f'header = "Authorization: Bearer {lab.client.http.connection.token}"\n'
    done = subprocess.run(command, input=config, capture_output=True, text=True, timeout=90, check=True)
    head, _, body = done.stdout.partition("\n\n")
    first, *lines = head.splitlines()
    return Answer(int(first.split()[1]), {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}, body)


def post(body: dict[str, Any], *headers: str) -> list[str]:
    return ["--data", json.dumps(body), *(part for header in ("Content-Type: application/json", *headers) for part in ("--header", header))]


def test_a_shell_script_submits_waits_and_reads_the_routing(lab: Lab) -> None:
    wanted = post({"preset": "nano-mixtral", "name": "from curl", "overrides": {"training.steps": 12}}, "Idempotency-Key: curl-1")
    made = curl(lab, "/runs", *wanted)
    assert (made.status, made.json["state"], made.json["steps"]) == (201, "queued", 12)
    run = made.json["id"]
    assert made.headers["location"] == f"/api/v1/runs/{run}"
    again = curl(lab, "/runs", *wanted)
    assert (again.status, again.json["id"]) == (200, run)

    ended = curl(lab, f"/runs/{run}?wait=terminal&timeout=60").json
    assert (ended["state"], ended["last_step"]) == ("succeeded", 12)
    routing = curl(lab, f"/runs/{run}/routing?step=12", "--header", "Accept: application/json").json
    assert routing["step"] == [12] and len(routing["expert_tokens"][0]) == len(ended["moe_layers"])
    assert len(curl(lab, f"/runs/{run}/export/metrics.csv").body.strip().splitlines()) == 13


def test_a_wrong_field_a_wrong_token_and_a_wrong_body_are_told(lab: Lab) -> None:
    wrong = curl(lab, "/runs", *post({"preset": "nano-mixtral", "overrides": {"model.moe.top_k": 9}}))
    assert (wrong.status, wrong.headers["content-type"]) == (422, "application/problem+json")
    assert [error["pointer"] for error in wrong.json["errors"]] == ["/overrides/model.moe.top_k"]
    assert "top_k 9 > n_experts 8" in wrong.json["detail"]
    assert curl(lab, "/runs", "--header", "Authorization: Bearer mlk_wrong").status in (400, 401)
    assert curl(lab, "/runs", *post({}), "--data", "{").status == 400
