"""A published config.json over REST: a spec that validates, or problems at its fields."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import Client

from experiments.actions.token import issue
from tests.experiments.engine import people
from tests.spec.test_huggingface import CONFIGS

pytestmark = pytest.mark.django_db


@pytest.fixture
def client() -> Client:
    secret = issue(user=people.user("reader"), name="t", scopes=["read"]).secret
    return Client(headers={"Authorization": f"Bearer {secret}"})


def post(client: Client, path: str, body: Any) -> Any:
    return client.post(f"/api/v1/{path}", json.dumps(body), content_type="application/json")


@pytest.mark.parametrize("name", ["OLMoE-1B-7B", "DeepSeek-V3", "Llama 4 Scout"])
def test_a_configuration_becomes_a_spec_that_can_be_priced(client: Client, name: str) -> None:
    total, config = CONFIGS[name]
    answer = post(client, "import-config", config)
    assert answer.status_code == 200, answer.content
    imported = answer.json()
    assert imported["price"]["total_params"] == total
    assert imported["problems"] == [] and imported["family"] == config["model_type"].replace("llama4", "llama4_text")
    assert bool(imported["notes"]) is (name == "DeepSeek-V3")
    assert post(client, "price", {"spec": imported["spec"]}).json() == imported["price"]


def test_what_cannot_be_carried_over_is_at_its_field(client: Client) -> None:
    answer = post(client, "import-config", {**CONFIGS["OLMoE-1B-7B"][1], "hidden_act": "relu", "mystery": 1})
    assert answer.status_code == 422
    assert [error["pointer"] for error in answer.json()["errors"]] == ["/hidden_act", "/mystery"]
    assert post(client, "import-config", {"hidden_size": 3}).json()["errors"][0]["pointer"] == "/model_type"
    assert post(client, "import-config", {"model_type": "gpt2"}).status_code == 422
    assert post(client, "import-config", [1]).status_code == 422


def test_the_body_does_not_grow_into_an_answer_without_bounds(client: Client) -> None:
    huge = {**CONFIGS["gpt-oss-20b"][1], "num_hidden_layers": 10**9}
    assert post(client, "import-config", huge).status_code == 422
    wide = {**CONFIGS["Qwen3-30B-A3B"][1], "num_hidden_layers": 10_000, "mlp_only_layers": list(range(0, 10_000, 2))}
    assert post(client, "import-config", wide).status_code in (200, 422)
