"""YAML in and out, and what is refused."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spec.experiment import ExperimentSpec
from spec.yaml_text import MAX_CHARACTERS, YamlError, dump, load, load_mapping
from tests.spec.strategies import specs


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(specs())
def test_a_spec_survives_its_text(spec: ExperimentSpec) -> None:
    text = dump(spec)
    assert ExperimentSpec.model_validate(load_mapping(text)) == spec
    assert [line.split(":")[0] for line in text.splitlines() if not line.startswith((" ", "-"))] == list(ExperimentSpec.model_fields)


def test_small_numbers_and_odd_names_survive() -> None:
    spec = ExperimentSpec.model_validate({"name": "no: 1e-3 # ü 文", "optimizer": {"eps": 1e-12, "lr": 1e-5}})
    assert ExperimentSpec.model_validate(load(dump(spec))) == spec


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: 1e-3", {"a": 0.001}),
        ("a: 1e6", {"a": 1e6}),
        ("a: no", {"a": "no"}),
        ("a: 012", {"a": 12}),
        ("a: 1:30", {"a": "1:30"}),
        ("a: 2020-01-01", {"a": "2020-01-01"}),
        ("a: [true, ~, null, '1', -2, .5]", {"a": [True, None, None, "1", -2, 0.5]}),
        ("a:", {"a": None}),
        ("# nothing", None),
    ],
)
def test_scalars_follow_the_core_schema(text: str, data: Any) -> None:
    assert load(text) == data


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x 1\nb: *x", "anchors and tags"),
        ("b: *x", "aliases are not supported: *x"),
        ("a: !!python/object/apply:os.system [ls]", "anchors and tags"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' appears twice"),
        ("m:\n  a: 1\n  a: 1", "line 3, column 3: the key 'a' appears twice"),
        ("1: 2", "a key must be a plain string"),
        ("? [1]\n: 2", "a key must be a plain string"),
        ("a: [", "line 1, column 5"),
        ("a: \0", "special characters are not allowed"),
        ("\ud800", "special characters are not allowed"),
        ("a: 1\n---\nb: 1", "another document"),
        ("\t- x", "cannot start any token"),
        ("[" * 10_000, "nested deeper than 32"),
        ("- " * 10_000, "nested deeper than 32"),
        ("[" + "a," * 10_000 + "]", "more than 5,000 keys and values"),
        ("a" * (MAX_CHARACTERS + 1), "256,001 characters > limit 256,000"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_place(text: str, reason: str) -> None:
    started = time.perf_counter()
    with pytest.raises(YamlError) as caught:
        load(text)
    assert reason in str(caught.value)
    assert time.perf_counter() - started < 2
    if str(caught.value).startswith("line "):
        assert caught.value.line >= 1 and caught.value.column >= 1


@pytest.mark.parametrize(("text", "what"), [("", "nothing"), ("[1]", "list"), ("word", "str")])
def test_a_spec_is_a_mapping(text: str, what: str) -> None:
    with pytest.raises(YamlError, match=f"a spec is a mapping of fields, not {what}"):
        load_mapping(text)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("ab:-[]{}?&*!|>'\"%@`,# \n\t~.0123e<=")), max_size=60) | st.text(max_size=30))
def test_any_text_is_data_or_refused(text: str) -> None:
    with contextlib.suppress(YamlError):
        load(text)
