"""The model that is built has the parameters that were counted."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from pydantic import ValidationError

from spec import presets
from spec.accounting import price
from spec.accounting.tensors import tensors
from spec.experiment import ExperimentSpec
from spec.trainable import problems
from tests.spec.strategies import specs

torch = pytest.importorskip("torch")


def built(spec: ExperimentSpec) -> Counter[tuple[int, int, bool]]:
    """Rows, and numbers in each, of all parameters, and whether they are routers'."""
    from moe.model import build_model

    with torch.device("meta"):
        model = build_model(spec.model)
    routers = {id(parameter) for parameter in model.router_parameters()}
    shapes = [(*(tuple(parameter.shape) or (0,)), id(parameter) in routers) for parameter in model.parameters()]
    return Counter((rows, math.prod(rest), router) for rows, *rest, router in shapes)


def counted(spec: ExperimentSpec) -> Counter[tuple[int, int, bool]]:
    found: Counter[tuple[int, int, bool]] = Counter()
    for tensor in tensors(spec.model):
        found[tensor.rows, tensor.width, tensor.role == "router"] += tensor.times
    cost = price(spec)
    assert sum(max(rows, 1) * width * times for (rows, width, _), times in found.items()) == cost.total_params + cost.mtp_params
    return found


TRAINABLE = [name for name in presets.names() if not problems(presets.load(name))]


@pytest.mark.parametrize("name", TRAINABLE)
def test_presets_are_built_as_counted(name: str) -> None:
    spec = presets.load(name)
    assert built(spec) == counted(spec)


def test_the_published_ones_are_among_them() -> None:
    assert {"mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3", "nano-mixtral", "nano-dense"} <= set(TRAINABLE)


def simplified(spec: ExperimentSpec) -> ExperimentSpec:
    """`spec` without what is only priced: those fields have their defaults instead."""
    for _ in range(10):
        found = problems(spec)
        if not found:
            return spec
        plain: dict[str, Any] = spec.model_dump(exclude_unset=True)
        for problem in found:
            *parents, name = problem.pointer.strip("/").split("/")
            part = plain
            for parent in parents if name != "kind" else parents[:-1]:
                part = part[parent]
            part.pop(name if name != "kind" else parents[-1])
        try:
            spec = ExperimentSpec.model_validate(plain)
        except ValidationError:  # the default of one field may not go with another
            assume(False)
    raise AssertionError(f"still refused: {problems(spec)}")


@pytest.mark.parametrize("train", ["all", "all_but_moe", "only_moe", "only_router"])
@pytest.mark.parametrize("name", ["nano-deepseek-v3", "nano-jetmoe", "nano-deepspeed-moe", "nano-qwen1.5-moe"])
def test_what_is_frozen_has_neither_gradient_nor_moments(name: str, train: str) -> None:
    from moe.model import build_model
    from moe.train.freeze import freeze

    plain = presets.load(name).model_dump()
    plain["training"]["train"] = train
    spec = ExperimentSpec.model_validate(plain)
    with torch.device("meta"):
        trained = sum(parameter.numel() for parameter in freeze(build_model(spec.model), train))
    size = price(spec).bytes
    assert (size.gradients, size.optimizer) == (4 * trained, 8 * trained)
    assert size.checkpoint == 4 * (price(spec).total_params + price(spec).mtp_params) + 8 * trained


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(specs())
def test_any_trainable_spec_is_built_as_counted(drawn: ExperimentSpec) -> None:
    spec = simplified(drawn)
    assert built(spec) == counted(spec)
