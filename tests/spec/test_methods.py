"""The registry of methods: whole, valid, trainable, proven by tests that exist, and printed in docs/methods.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from spec import attention, balance, model, moe, routing, start, training
from spec.experiment import ExperimentSpec
from spec.methods import Method, UnknownMethodError, method, methods
from spec.methods.page import markdown
from spec.problems import Problem
from spec.trainable import problems

ROOT = Path(__file__).resolve().parents[2]
METHODS = [pytest.param(entry, id=entry.key) for entry in methods()]


@cache
def proofs_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("entry", METHODS)
def test_its_proof_exists(entry: Method) -> None:
    path, _, name = entry.test.partition("::")
    assert name in proofs_in(path)


@pytest.mark.parametrize("entry", METHODS)
def test_its_spec_is_trained_unless_it_is_only_priced(entry: Method) -> None:
    found: list[Problem] = problems(entry.experiment())
    assert bool(found) == entry.priced_only, found


@pytest.mark.parametrize("entry", METHODS)
def test_its_spec_says_only_what_it_changes_and_all_of_it(entry: Method) -> None:
    assert entry.spec and entry.rule.endswith(".") and entry.source and entry.reports and entry.oracle
    assert ExperimentSpec.model_validate(entry.spec) != ExperimentSpec() or entry.key in DEFAULTS


# What the default spec has already: named all the same, so that it can be found.
DEFAULTS = {"topk_softmax", "switch_aux", "dropless", "scratch"}


def said(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every (field, value) of a snippet; the kinds of a union under their class of part."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from said(inner, f"{name}.kind" if key == "kind" else key)
    elif isinstance(value, list):
        for inner in value:
            yield from said(inner, name)
    else:
        yield name, value


SAID = {pair for entry in methods() for pair in said(entry.spec)}
PARTS: list[type[BaseModel]] = [routing.Router, routing.Capacity, moe.Moe, model.Model, attention.GroupedQueryAttention, training.Training]


def choices(part: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """(field, value) of every choice that is not the default, and every switch that is off."""
    for name, field in part.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if field.annotation is bool and default is False:
            yield name, True
        if get_origin(field.annotation) is Literal and name != "kind":
            yield from ((name, value) for value in get_args(field.annotation) if value != default)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_choice_of_a_part_is_a_method_s(part: type[BaseModel]) -> None:
    assert set(choices(part)) - SAID == set()


def kinds(union: Any) -> set[str]:
    return {part.model_fields["kind"].default for part in get_args(get_args(union)[0])}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("router.kind", set(get_args(routing.RouterKind))),
        ("balance.kind", kinds(balance.BalanceTerm)),
        ("capacity.kind", {"dropless", "factor"}),
        ("attention.kind", kinds(attention.Attention)),
        ("start.kind", kinds(start.Start) - {"scratch"}),
    ],
)
def test_every_kind_is_a_method_s(name: str, wanted: set[str]) -> None:
    assert wanted - {value for key, value in SAID if key == name} == set()


def test_keys_are_unique_and_unknown_ones_are_told() -> None:
    keys = [entry.key for entry in methods()]
    assert len(set(keys)) == len(keys)
    assert method("mla").group == "architecture"
    with pytest.raises(UnknownMethodError):
        method("mlb")


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "methods.md").read_text() == markdown(), "run python -m spec.methods"
