"""The model that is built has the parameters that were counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from spec import presets
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.trainable import problems
from tests.spec.strategies import specs

torch = pytest.importorskip("torch")


def built(spec: ExperimentSpec) -> int:
    from moe.model import build_model

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(spec.model).parameters())


TRAINABLE = [name for name in presets.names() if not problems(presets.load(name))]


@pytest.mark.parametrize("name", TRAINABLE)
def test_presets_are_built_as_counted(name: str) -> None:
    spec = presets.load(name)
    assert built(spec) == price(spec).total_params


def test_the_published_ones_are_among_them() -> None:
    assert {"mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3", "nano-mixtral", "nano-dense"} <= set(TRAINABLE)


def simplified(spec: ExperimentSpec) -> ExperimentSpec:
    """`spec` without what is only priced, so that most draws can be built."""
    plain: dict[str, Any] = spec.model_dump()
    model = plain["model"]
    model.update(encoder_layers=0, position="rope", sandwich_norm=False)
    if model["attention"]["kind"] == "gqa":
        model["attention"].update(sinks=False, sliding_window=None, experts=None)
    if model["moe"]:
        model["moe"].update(activation=None, bias="none")
        model["moe"]["router"]["bias"] = False
        if model["moe"]["first_k_dense"] + model["moe"]["every"] > model["n_layers"]:
            model["moe"] = None
    plain["parallel"]["expert"] = 1
    return ExperimentSpec.model_validate(plain)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(specs())
def test_any_trainable_spec_is_built_as_counted(drawn: ExperimentSpec) -> None:
    spec = simplified(drawn)
    assert problems(spec) == []
    assert built(spec) == price(spec).total_params
