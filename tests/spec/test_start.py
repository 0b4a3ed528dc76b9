"""Starts: what may be said, what is refused at its field, and which weights fit which spec."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from spec import start_fits
from spec.experiment import ExperimentSpec
from spec.problems import from_validation_error
from spec.successor import fine_tuning, upcycling

DENSE: dict[str, Any] = {"model": {"moe": None, "d_ff": 128}}
MOE: dict[str, Any] = {"model": {"moe": {"n_experts": 4, "top_k": 2, "d_expert": 128}}}


def spec(plain: dict[str, Any], **parts: Any) -> ExperimentSpec:
    return ExperimentSpec.model_validate({**plain, **parts})


@pytest.mark.parametrize(
    ("plain", "pointer", "says"),
    [
        ({"start": {"kind": "checkpoint"}}, "/start/run", "run or path must"),
        ({"start": {"kind": "checkpoint", "run": 1, "path": "a"}}, "/start/run", "run and path are given"),
        ({"start": {"kind": "checkpoint", "path": ""}}, "/start/path", "empty"),
        ({"start": {"kind": "checkpoint", "run": 0}}, "/start/run", "greater than or equal to 1"),
        ({"start": {"kind": "huggingface"}}, "/start/path", "missing"),
        ({"start": {"kind": "magic"}}, "/start/kind", "scratch, checkpoint, huggingface, upcycle"),
        ({**MOE, "start": {"kind": "upcycle", "huggingface": "a", "step": 1}}, "/start/step", "huggingface has none"),
        ({**MOE, "start": {"kind": "upcycle", "run": 1, "granularity": 2}}, "/start/granularity", "copy takes 1"),
        ({**MOE, "start": {"kind": "upcycle", "run": 1, "method": "granular"}}, "/start/granularity", "at least 2"),
        ({**DENSE, "start": {"kind": "upcycle", "run": 1}}, "/start/kind", "model.moe is null"),
        ({**MOE, "start": {"kind": "upcycle", "run": 1, "method": "granular", "granularity": 3}}, "/start/granularity", "n_experts 4"),
        ({**MOE, "start": {"kind": "upcycle", "run": 1, "expand": 3}}, "/start/granularity", "n_experts 4"),
        ({**DENSE, "training": {"train": "only_router"}}, "/training/train", "model.moe is null"),
        (
            {"model": {"moe": {"router": {"kind": "hash"}, "balance": []}}, "training": {"train": "only_router"}},
            "/training/train",
            "hash has nothing to learn",
        ),
        (
            {"model": {"moe": {"n_shared": 1, "combine": "sigmoid_gate"}}, "start": {"kind": "upcycle", "run": 1}},
            "/start/kind",
            "combine sum",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_its_field(plain: dict[str, Any], pointer: str, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ExperimentSpec.model_validate(plain)
    found = from_validation_error(refused.value)
    assert any(problem.pointer == pointer and says in problem.detail for problem in found), found


def test_a_spec_from_before_there_were_starts_begins_from_scratch() -> None:
    plain = ExperimentSpec().model_dump(mode="json")
    del plain["start"], plain["training"]["train"]
    assert ExperimentSpec.model_validate(plain) == ExperimentSpec()


@pytest.mark.parametrize(
    ("change", "pointers"),
    [
        ({}, []),
        ({"model": {**MOE["model"], "dropout": 0.1, "init_std": 0.5, "rope_theta": 1e6}}, []),
        ({"model": {"moe": {**MOE["model"]["moe"], "top_k": 1, "capacity": {"kind": "factor"}, "balance": []}}}, []),
        ({"model": {"moe": {**MOE["model"]["moe"], "router": {"kind": "softmax_topk", "renormalise": True}}}}, []),
        ({"model": {"moe": {**MOE["model"]["moe"], "router": {"scorer": "cosine"}}}}, ["/model/moe/router/scorer"]),
        ({"model": {**MOE["model"], "d_model": 64}}, ["/model/d_model", "/model/attention/head_dim"]),
        ({"model": {**MOE["model"], "tie_embeddings": False}}, ["/model/tie_embeddings"]),
        ({"model": {"moe": {**MOE["model"]["moe"], "n_experts": 8}}}, ["/model/moe/n_experts"]),
        ({"model": {"moe": None}}, ["/model/moe"]),
        ({"data": {"tokenizer": "bpe", "bpe_vocab_size": 257}}, ["/data/tokenizer"]),
    ],
)
def test_which_checkpoints_fit(change: dict[str, Any], pointers: list[str]) -> None:
    target = spec({**MOE, **change}, start={"kind": "checkpoint", "run": 7})
    found = start_fits.problems(target, spec(MOE), "run 7")
    for pointer in pointers:
        assert any(problem.pointer == pointer and "run 7 has" in problem.detail for problem in found), found
    assert bool(found) == bool(pointers)


def test_byte_pairs_must_have_been_learnt_from_the_same_text() -> None:
    data = {"tokenizer": "bpe", "bpe_vocab_size": 258}
    source = spec(MOE, data={**data, "domains": ["code"]})
    other = spec(MOE, data={**data, "domains": ["prose"]}, start={"kind": "checkpoint", "run": 7})
    assert [problem.pointer for problem in start_fits.problems(other, source, "run 7")] == ["/data/domains"]


@pytest.mark.parametrize(
    ("source", "target", "pointers"),
    [
        (DENSE, MOE, []),
        (MOE, MOE, ["/start/run"]),
        ({"model": {"moe": None, "d_ff": 96}}, MOE, ["/model/moe/d_expert"]),
        ({"model": {"moe": None, "d_ff": 128, "n_layers": 5}}, MOE, ["/model/n_layers"]),
        ({"model": {"moe": None, "d_ff": 128, "activation": "gelu"}}, MOE, ["/model/activation"]),
        (DENSE, {"model": {"d_ff": 64, "moe": {**MOE["model"]["moe"], "every": 2}}}, ["/model/d_ff"]),
        (DENSE, {"model": {"moe": {**MOE["model"]["moe"], "d_expert": 96, "n_shared": 1, "d_shared": 32}}}, []),
    ],
)
def test_which_dense_models_can_be_upcycled(source: dict[str, Any], target: dict[str, Any], pointers: list[str]) -> None:
    found = start_fits.problems(spec(target, start={"kind": "upcycle", "run": 7}), spec(source), "run 7")
    assert [problem.pointer for problem in found] == pointers, found


@pytest.mark.parametrize("method", ["copy", "granular"])
def test_successors_fit_the_run_that_they_come_from(method: Any) -> None:
    dense = spec(DENSE, name="d")
    for made in (fine_tuning(dense, 7, 10), upcycling(dense, 7, method=method)):
        assert start_fits.problems(made, dense, "run 7") == []
        assert made.start.kind != "scratch" and made.name.startswith("d, ")
    with pytest.raises(ValueError, match="MoE layers already"):
        upcycling(spec(MOE), 7)
