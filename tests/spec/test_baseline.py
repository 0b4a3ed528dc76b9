"""Dense baselines against brute force over every width, and what becomes of the rest of the spec."""

from __future__ import annotations

from typing import Any

import pytest

from spec import presets
from spec.accounting import price
from spec.baseline import Equal, NoBaselineError, dense_baseline
from spec.experiment import ExperimentSpec

TINY: dict[str, Any] = {"n_layers": 3, "d_model": 16, "vocab_size": 300, "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}}


def experiment(moe: dict[str, Any], **parts: Any) -> ExperimentSpec:
    model = {**TINY, **parts.pop("model", {}), "moe": moe}
    return ExperimentSpec.model_validate({"model": model, **parts})


def cost(spec: ExperimentSpec, equal: Equal) -> int:
    figures = price(spec)
    return figures.flops_per_token.forward if equal == "flops" else figures.active_params.with_embeddings


def by_brute_force(spec: ExperimentSpec, equal: Equal, widest: int = 400) -> int:
    """The width of the dense model whose cost is closest, by trying each."""
    plain = spec.model_dump(mode="json")
    plain["model"] |= {"moe": None}
    plain["model"]["attention"]["experts"] = None
    wanted, found = cost(spec, equal), {}
    for width in range(1, widest):
        found[width] = abs(cost(ExperimentSpec.model_validate({**plain, "model": {**plain["model"], "d_ff": width}}), equal) - wanted)
    return min(found, key=lambda width: (found[width], width))


@pytest.mark.parametrize("equal", ["flops", "params"])
@pytest.mark.parametrize(
    ("moe", "model"),
    [
        ({"n_experts": 8, "top_k": 2, "d_expert": 24}, {}),
        ({"n_experts": 5, "top_k": 3, "d_expert": 7, "n_shared": 2, "d_shared": 9, "combine": "sigmoid_gate"}, {}),
        ({"n_experts": 64, "top_k": 1, "d_expert": 1}, {}),
        ({"n_experts": 8, "top_k": 2, "d_expert": 40, "first_k_dense": 1}, {"d_ff": 100}),
        ({"n_experts": 8, "top_k": 2, "d_expert": 40, "every": 2}, {"d_ff": 10, "activation": "gelu"}),
        ({"n_experts": 8, "top_k": 2, "d_expert": 24}, {"attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "experts": {}}}),
        ({"n_experts": 8, "top_k": 2, "d_expert": 24}, {"mtp_depth": 2, "tie_embeddings": False}),
    ],
)
def test_the_width_is_the_one_that_brute_force_finds(moe: dict[str, Any], model: dict[str, Any], equal: Equal) -> None:
    spec = experiment(moe, model=model)
    assert dense_baseline(spec, equal).model.d_ff == by_brute_force(spec, equal)


@pytest.mark.parametrize("name", presets.names())
@pytest.mark.parametrize("equal", ["flops", "params"])
def test_every_presets_baseline_is_within_one_hidden_unit_of_its_cost(name: str, equal: Equal) -> None:
    spec = presets.load(name)
    if spec.model.moe is None:
        return
    dense = dense_baseline(spec, equal)
    plain = dense.model_dump(mode="json")
    wider = ExperimentSpec.model_validate({**plain, "model": {**plain["model"], "d_ff": dense.model.d_ff + 1}})
    unit = cost(wider, equal) - cost(dense, equal)
    assert abs(cost(dense, equal) - cost(spec, equal)) * 2 <= unit
    assert dense.model.moe is None


def test_the_rest_stays_and_what_needs_experts_goes() -> None:
    parts = {"training": {"train": "only_moe", "steps": 77, "batch_size": 8}, "parallel": {"expert": 2, "data": 2}, "seed": 5, "name": "mine"}
    spec = experiment({"n_experts": 8, "top_k": 2, "d_expert": 24}, start={"kind": "upcycle", "run": 3}, **parts)
    dense = dense_baseline(spec)
    assert (dense.start.kind, dense.training.train, dense.training.steps, dense.seed, dense.name) == ("scratch", "all", 77, 5, "mine, dense")
    assert dense.parallel.world_size == spec.parallel.world_size == 4 and dense.parallel.expert == 1
    assert dense.data == spec.data and dense.optimizer == spec.optimizer


@pytest.mark.parametrize(
    ("model", "pointer", "says"),
    [
        ({"moe": None}, "/model/moe", "dense already"),
        ({"d_model": 8, "moe": {"n_experts": 64, "top_k": 64, "d_expert": 1_048_576}}, "/model/d_ff", "1,048,576"),
    ],
)
def test_what_has_no_baseline_is_told_at_its_field(model: dict[str, Any], pointer: str, says: str) -> None:
    with pytest.raises(NoBaselineError) as refused:
        dense_baseline(ExperimentSpec.model_validate({"model": {**TINY, **model}}))
    assert [problem.pointer for problem in refused.value.problems] == [pointer]
    assert says in str(refused.value)
