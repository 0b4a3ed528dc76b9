"""Fields set by dotted path, and the difference of two specs."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spec.diff import diff
from spec.experiment import ExperimentSpec
from spec.overrides import OverrideError, apply
from tests.spec.strategies import specs

WHOLE = ExperimentSpec().model_dump(mode="json")


def test_changes_reach_their_fields_and_nothing_else() -> None:
    before = copy.deepcopy(WHOLE)
    changed = apply(WHOLE, {"model.moe.top_k": 4, "model.moe.balance": [], "name": "wide", "model.attention.n_heads": 8})
    assert before == WHOLE
    assert diff(WHOLE, changed) == [
        ("name", "untitled", "wide"),
        ("model.attention.n_heads", 4, 8),
        ("model.moe.top_k", 2, 4),
        ("model.moe.balance", [{"kind": "switch_aux", "coefficient": 0.01, "choices": "all"}], []),
    ]
    assert ExperimentSpec.model_validate(changed).model.moe is not None


def test_items_of_a_list_are_reached_by_index() -> None:
    changed = apply(WHOLE, {"model.moe.balance.0.coefficient": 0.5})
    assert diff(WHOLE, changed) == [("model.moe.balance.0.coefficient", 0.01, 0.5)]
    changed = apply(WHOLE, {"data.domains.1": "code"})
    assert changed["data"]["domains"] == ["code", "code", "tables"]


def test_missing_and_null_parts_are_begun_with_their_defaults() -> None:
    assert apply({}, {"model.attention.n_heads": 8, "model.moe.router.kind": "switch"}) == {
        "model": {"attention": {"kind": "gqa", "n_heads": 8}, "moe": {"router": {"kind": "switch"}}}
    }
    assert apply({"model": {"moe": None}}, {"model.moe.top_k": 1}) == {"model": {"moe": {"top_k": 1}}}
    assert apply(WHOLE, {"model.attention.experts.top_k": 1})["model"]["attention"]["experts"] == {"top_k": 1}
    assert apply(WHOLE, {"model.moe": None})["model"]["moe"] is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_new_kind_keeps_the_shared_fields_whatever_the_order(order: int) -> None:
    changes = dict([("model.attention.kv_lora_rank", 32), ("model.attention.kind", "mla")][::order])
    changed = apply(apply(WHOLE, {"model.attention.n_heads": 2, "model.attention.n_kv_heads": 2}), changes)
    assert changed["model"]["attention"] == {"kind": "mla", "n_heads": 2, "kv_lora_rank": 32}
    ExperimentSpec.model_validate(changed)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("model.moe.topk", "model.moe.topk: model.moe has no field 'topk'; did you mean 'top_k'?"),
        ("modle", "modle: the spec has no field 'modle'; did you mean 'model'?"),
        ("model.d_model.x", "model.d_model.x: model.d_model has no fields"),
        ("model.moe.balance.3.coefficient", "'3' is not an index of a list of 1"),
        ("model.moe.balance.-1", "'-1' is not an index of a list of 1"),
        ("model.moe.balance." + "9" * 5000, "is not an index of a list of 1"),
        ("model.moe.balance.0.update_rate", "model.moe.balance.0 has no field 'update_rate', only kind, coefficient"),
        ("model.attention.q_lora_rank", "model.attention has no field 'q_lora_rank', only kind, n_heads"),
        ("", "the spec has no field ''"),
        ("model..moe", "model has no field ''"),
        ("model.__class__", "model has no field '__class__'"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(path: str, reason: str) -> None:
    with pytest.raises(OverrideError) as caught:
        apply(WHOLE, {path: 1})
    assert reason in str(caught.value) and caught.value.path == path


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["model", "moe", "kind", "attention", "balance"]), inner, max_size=3)
        ),
    ),
    st.lists(st.sampled_from(["model", "moe", "attention", "kind", "balance", "0", "top_k", "x", ""]), max_size=5),
)
def test_whatever_stands_there_a_path_is_set_or_refused(there: Any, keys: list[str]) -> None:
    plain = there if isinstance(there, dict) else {"model": there}
    with contextlib.suppress(OverrideError):
        apply(plain, {".".join(keys): 1})


def present(plain: Any, path: str) -> bool:
    """Whether `plain` has the field: a field of another kind is none to set."""
    for key in path.split("."):
        if isinstance(plain, dict) and key not in plain:
            return False
        plain = plain[int(key)] if isinstance(plain, list) else plain[key]
    return True


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(specs(), specs())
def test_a_difference_applied_gives_the_other_spec(one: ExperimentSpec, other: ExperimentSpec) -> None:
    a, b = one.model_dump(mode="json"), other.model_dump(mode="json")
    assert diff(a, a) == []
    changes = {path: value for path, _, value in diff(a, b) if present(b, path)}
    assert ExperimentSpec.model_validate(apply(a, changes)) == other


def test_true_and_one_differ() -> None:
    assert diff({"a": True, "b": [1, 2]}, {"a": 1, "b": [1, 3], "c": None}) == [("a", True, 1), ("b.1", 2, 3)]
    assert diff({"b": [1]}, {"b": [1, 2]}) == [("b", [1], [1, 2])]
