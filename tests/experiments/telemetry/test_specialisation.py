"""What experts specialise on: from the spool's bytes to REST and the page, and only what still counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from django.test import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.models import Run
from experiments.models.telemetry import Specialisation
from experiments.telemetry import specialisation
from experiments.telemetry.write import ingest
from spec import block, events
from spec.events import EventError, SpecialisationCounted, decode, encode
from tests.experiments.telemetry.conftest import E, L, declared, person, started, step, token_of
from tests.experiments.telemetry.test_store import payloads, send

CLASSES = {"keyword": 40, "never": 0, "name": 60}
DOMAINS = {"code": 60, "prosa & <b>": 40}


def counted(number: int, salt: int = 0) -> SpecialisationCounted:
    """Counts that depend on the step and `salt` alone."""
    rng = np.random.default_rng([number, salt])
    by_class = rng.integers(0, 40, (L, E, 3)).astype(np.uint32)
    by_class[:, :, 1] = 0
    return SpecialisationCounted(number, 1.7e9, CLASSES, DOMAINS, by_class, rng.integers(0, 40, (L, E, 2)).astype(np.uint32))


def api(run: Run) -> Client:
    return Client(headers={"authorization": f"Bearer {token_of(run.owner, 'read')}"})


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.text(max_size=5).map(lambda name: name.encode("ascii", "replace").decode()), min_size=1, unique=True),
)
def test_there_and_back(layers: int, experts: int, names: list[str]) -> None:
    names = [name.replace("\x00", "") + str(n) for n, name in enumerate(names)]
    array = np.arange(layers * experts * len(names), dtype=np.uint32).reshape(layers, experts, len(names))
    event = SpecialisationCounted(3, 1.5, {name: n for n, name in enumerate(names)}, {"d": 1}, array, array[:, :, :1])
    found = decode(encode(event))
    assert isinstance(found, SpecialisationCounted)
    assert len(found.classes) == len(names)
    assert list(found.classes.values()) == list(range(len(names)))
    np.testing.assert_array_equal(found.class_tokens, array)
    np.testing.assert_array_equal(found.domain_tokens, array[:, :, :1])


@pytest.mark.parametrize(
    "change",
    [
        {"class_tokens": np.zeros((2, 3), np.uint32)},
        {"class_tokens": np.zeros((2, 3, 4), np.uint32)},
        {"class_tokens": np.zeros((2, 3, 3), np.int32)},
        {"class_tokens": np.zeros((0, 3, 3), np.uint32)},
        {"domain_tokens": np.zeros((1, 3, 2), np.uint32)},
        {"domain_tokens": None},
        {"classes": {}},
        {"classes": {"a": -1, "b": 1, "c": 1}},
        {"step": -1},
        {"step": 2**31},
        {"more": 1},
    ],
)
def test_what_is_no_count_is_refused(change: dict[str, Any]) -> None:
    event = counted(1)
    header: dict[str, Any] = {"event": event.event, "step": 1, "at": 1.0, "classes": CLASSES, "domains": DOMAINS}
    arrays = {"class_tokens": event.class_tokens, "domain_tokens": event.domain_tokens}
    for name, value in change.items():
        (arrays if name in arrays else header)[name] = value
    with pytest.raises(EventError):
        decode(block.encode(header, {name: array for name, array in arrays.items() if array is not None}))


def test_rest_gives_counts_and_shares(run: Run) -> None:
    send(run, [started(), declared(), step(1), counted(1), step(2), counted(2)])
    answer = api(run).get(f"/api/v1/runs/{run.pk}/specialisation?step=1&layer=1").json()
    assert (answer["steps"], answer["step"], answer["layer"], answer["layers"]) == ([1, 2], 1, 1, [0, 1])
    assert answer["chance"] == pytest.approx(1 / E)
    assert [one["name"] for one in answer["classes"]] == ["keyword", "name"], "a class without a token has no share"
    for group, names, tokens in (("classes", list(CLASSES), counted(1).class_tokens), ("domains", list(DOMAINS), counted(1).domain_tokens)):
        for one in answer[group]:
            column = tokens[1, :, names.index(one["name"])]
            assert one["expert_tokens"] == column.tolist()
            np.testing.assert_allclose(one["expert_share"], column / one["tokens"])
    assert api(run).get(f"/api/v1/runs/{run.pk}/specialisation").json()["step"] == 2
    for query, status in (("step=3", 404), ("layer=2", 404), ("layer=x", 400), ("step=-1", 400), ("page=1", 400)):
        refused = api(run).get(f"/api/v1/runs/{run.pk}/specialisation?{query}")
        assert refused.status_code == status and refused.json()["detail"], query


def test_a_run_without_counts_says_so(run: Run) -> None:
    send(run, [started(), declared(), step(1)])
    answer = api(run).get(f"/api/v1/runs/{run.pk}/specialisation").json()
    assert (answer["steps"], answer["step"], answer["classes"], answer["domains"]) == ([], None, [], [])


def test_only_members_see_it(run: Run) -> None:
    send(run, [started(), declared(), step(1), counted(1)])
    outsider = Client(headers={"authorization": f"Bearer {token_of(person('outsider'), 'read')}"})
    assert outsider.get(f"/api/v1/runs/{run.pk}/specialisation").status_code == 404
    assert Client().get(f"/api/v1/runs/{run.pk}/specialisation").status_code == 401


def test_sent_twice_it_is_there_once(run: Run) -> None:
    frame = [started(), declared(), step(1), counted(1)]
    send(run, frame)
    send(run, frame)
    assert Specialisation.objects.filter(run=run).count() == 1


def test_what_a_dead_attempt_made_past_its_successor_s_checkpoint_is_not_read(make_run: Callable[..., Run]) -> None:
    run = make_run()
    steps = [step(n) for n in range(1, 31)]
    send(run, [started(1), declared(), *steps, counted(10), counted(20), counted(30)])
    Run.objects.filter(pk=run.pk).update(attempt=2)
    ingest(run.pk, 2, 1, payloads([started(2, 15), declared(), *(step(n) for n in range(16, 25)), counted(20, salt=1)]), holder=2)
    assert specialisation.steps(run.pk) == [20, 10]
    found = specialisation.layer(run.pk, 20, 0)
    assert found is not None
    np.testing.assert_array_equal(found.classes[0].taken, counted(20, salt=1).class_tokens[0, :, 0])
    assert specialisation.layer(run.pk, 30, 0) is None


def test_the_page_shows_shares_against_chance(run: Run, client: Client) -> None:
    by_class = np.array([[[40, 0, 5], [0, 0, 20], [0, 0, 35]]] * L, np.uint32)
    event = SpecialisationCounted(7, 1.7e9, CLASSES, DOMAINS, by_class, by_class[:, :, ::2])
    send(run, [started(), declared(), step(7), event])
    client.force_login(run.owner)
    page = client.get(f"/runs/{run.pk}/panel/specialisation?layer=1&step=7").content.decode()
    assert "prosa &amp; &lt;b&gt;" in page
    assert 'data-heat="3" title="3 times chance">100 %<' in page
    assert 'data-heat="none" title="0 times chance">0 %<' in page
    assert 'data-heat="0" title="1 times chance">33.3 %<' in page
    assert '<option value="1" selected>1</option>' in page
    assert "never" not in page
    assert client.get(f"/runs/{run.pk}/panel/specialisation?layer=99&step=hello").status_code == 200


def test_the_page_of_very_many_experts_shows_the_first(run: Run, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    send(run, [started(), declared(), step(1), counted(1)])
    client.force_login(run.owner)
    monkeypatch.setattr("experiments.pages.specialisation.MAX_CELLS", 4)
    answer = client.get(f"/runs/{run.pk}/panel/specialisation")
    assert [(len(table["rows"]), table["left_out"]) for table in answer.context["tables"]] == [(2, E - 2), (4 // len(DOMAINS), E - 4 // len(DOMAINS))]
    assert f"{E - 2} more experts" in answer.content.decode()


def test_the_page_of_a_run_without_counts(run: Run, client: Client) -> None:
    client.force_login(run.owner)
    assert "Nothing counted yet" in client.get(f"/runs/{run.pk}/panel/specialisation").content.decode()


def test_a_run_takes_its_counts_with_it(run: Run) -> None:
    send(run, [started(), declared(), step(1), counted(1)])
    run.delete()
    assert not Specialisation.objects.exists()


def test_bits_per_byte_are_kept(run: Run) -> None:
    send(run, [started(), declared(), step(1), events.EvalDone(step=1, at=1.7e9, loss=2, bits_per_byte=1.25)])
    assert api(run).get(f"/api/v1/runs/{run.pk}/events?kind=eval_done").json()["items"][0]["body"]["bits_per_byte"] == 1.25
