"""Problems lie at the field at fault, name it, and name the limit."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from spec.experiment import ExperimentSpec
from spec.problems import Problem, from_validation_error, pointer
from spec.trainable import problems as untrainable


def found(plain: Any) -> list[tuple[str, str]]:
    with pytest.raises(ValidationError) as caught:
        ExperimentSpec.model_validate(plain)
    return [(problem.pointer, problem.detail) for problem in from_validation_error(caught.value)]


@pytest.mark.parametrize(
    ("plain", "pointer", "detail"),
    [
        ({"model": {"moe": {"top_k": 9}}}, "/model/moe/top_k", "top_k 9 > n_experts 8"),
        ({"model": {"attention": {"kind": "gqa", "n_heads": 0}}}, "/model/attention/n_heads", "n_heads: should be greater than or equal to 1, not 0"),
        ({"model": {"attention": {"kind": "rnn"}}}, "/model/attention/kind", "kind: should be one of gqa, mla, lightning"),
        ({"model": {"attention": {}}}, "/model/attention/kind", "kind: should be one of gqa, mla, lightning"),
        (
            {"model": {"moe": {"balance": [{"kind": "z_loss", "coefficient": -1}]}}},
            "/model/moe/balance/0/coefficient",
            "coefficient: should be greater than or equal to 0, not -1",
        ),
        ({"model": {"moe": {"balance": [{"kind": "z_loss"}, {"kind": "z_loss"}]}}}, "/model/moe/balance", "balance lists the same term twice"),
        ({"model": {"moe": {"router": {"n_groups": 3}}}}, "/model/moe/router/n_groups", "router.n_groups 3 does not divide n_experts 8"),
        ({"model": {"attention": {"kind": "gqa", "n_heads": 3}}}, "/model/attention/n_kv_heads", "n_kv_heads 4 does not divide n_heads 3"),
        ({"parallel": {"expert": 3}}, "/parallel/expert", "parallel.expert 3 does not divide model.moe.n_experts 8"),
        (
            {"parallel": {"data": 4, "nodes": 3}},
            "/parallel/nodes",
            "nodes 3 does not divide the 4 ranks of parallel.expert x parallel.data",
        ),
        ({"parallel": {"nodes": 0}}, "/parallel/nodes", "nodes: should be greater than or equal to 1, not 0"),
        (
            {"parallel": {"expert": 2}, "model": {"moe": {"balance": [{"kind": "device_aux", "n_devices": 4}]}}},
            "/model/moe/balance",
            "model.moe.balance device_aux n_devices 4 is not parallel.expert 2: its devices are the ranks that share the experts",
        ),
        (
            {"parallel": {"expert": 4}, "model": {"moe": {"n_experts": 12, "router": {"n_groups": 3, "top_groups": 2}}}},
            "/model/moe/router/n_groups",
            "model.moe.router.n_groups 3 and parallel.expert 4 do not divide each other: the experts of a group would lie on parts of ranks",
        ),
        ({"model": {"vocab_size": 10}}, "/model/vocab_size", "model.vocab_size 10 < 257, which data.tokenizer byte needs"),
        ({"training": {"steps": None}}, "/training/steps", "steps: should be a valid integer, not null"),
        ({"training": []}, "/training", "training: should be a mapping of fields, not []"),
        ({"trainning": {}}, "/trainning", "trainning: is not a field of the spec"),
        ({"a/b~c": 1}, "/a~1b~0c", "a/b~c: is not a field of the spec"),
        ({"optimizer": {"lr": float("inf")}}, "/optimizer/lr", "lr: should be a finite number, not Infinity"),
        ({"name": "a\0b"}, "/name", "name: contains the character U+0000, which cannot be stored"),
        ({"name": "x" * 201}, "/name", f'name: should have at most 200 characters, not "{"x" * 56}...'),
        ({"seed": "abc"}, "/seed", 'seed: should be a valid integer, not "abc"'),
        ({"seed": 1.5}, "/seed", "seed: should be a valid integer, not 1.5"),
        ({"optimizer": {"lr": "fast"}}, "/optimizer/lr", 'lr: should be a valid number, not "fast"'),
        ([], "", "should be a mapping of fields, not []"),
    ],
)
def test_each_problem_lies_at_its_field(plain: Any, pointer: str, detail: str) -> None:
    assert found(plain) == [(pointer, detail)]


def test_all_problems_are_told_at_once_and_long_values_cut() -> None:
    problems = found({"seed": "x" * 500, "training": {"steps": 0, "batch_size": 0}})
    assert [pointer for pointer, _ in problems] == ["/seed", "/training/steps", "/training/batch_size"]
    assert len(problems[0][1]) < 200


def test_a_problem_is_one_line_with_its_path() -> None:
    assert str(Problem("/model/moe/top_k", "top_k: should be an integer")) == "model.moe.top_k: should be an integer"
    assert str(Problem("/model/moe/top_k", "top_k 9 > n_experts 8")) == "model.moe.top_k: top_k 9 > n_experts 8"
    assert str(Problem("", "should be a mapping")) == "should be a mapping"
    assert pointer("a", 0, "b/c") == "/a/0/b~1c"


@pytest.mark.parametrize(
    ("plain", "pointers"),
    [
        ({}, []),
        ({"model": {"moe": None}}, []),
        ({"model": {"attention": {"kind": "mla"}}}, []),
        ({"model": {"encoder_layers": 2, "position": "t5_relative"}}, ["/model/encoder_layers", "/model/position"]),
        ({"model": {"attention": {"kind": "lightning"}}}, ["/model/attention/kind"]),
        ({"model": {"attention": {"kind": "gqa", "sinks": True, "sliding_window": 64}}}, []),
        ({"model": {"attention": {"kind": "gqa", "experts": {}}}}, []),
        ({"model": {"attention": {"kind": "gqa", "experts": {}}, "moe": None}}, ["/model/attention/experts"]),
        ({"model": {"moe": {"bias": "expert", "router": {"bias": True}}}}, []),
        ({"model": {"sandwich_norm": True, "mtp_depth": 1, "moe": {"activation": "gelu"}}}, []),
        ({"model": {"moe": {"activation": "swiglu"}}}, []),
        ({"parallel": {"data": 2}}, []),
        ({"parallel": {"expert": 2}}, []),
    ],
)
def test_what_is_priced_but_not_trained_is_told_at_its_field(plain: Any, pointers: list[str]) -> None:
    problems = untrainable(ExperimentSpec.model_validate(plain))
    assert [problem.pointer for problem in problems] == pointers
    assert all("not trained here" in problem.detail for problem in problems)
