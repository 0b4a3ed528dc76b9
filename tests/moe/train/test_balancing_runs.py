"""Balancing, capacity and their telemetry in real runs of the tiny model, and over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.model import Transformer, build_model
from spec import events
from tests.moe.parallel.ranks import on_ranks
from tests.moe.train.tiny import Run, tiny

Start = Callable[..., Run]
MOE = {"n_experts": 4, "top_k": 2, "d_expert": 32}


def started(run: Start, moe: dict[str, Any], **training: Any) -> Run:
    done = run(model={"moe": {**MOE, **moe}}, training={"steps": 2, "eval_every": 0, **training})
    done.go()
    return done


def scalars(run: Run) -> dict[str, list[float]]:
    (declared,) = (event for event in run.events if isinstance(event, events.MetricsDeclared))
    rows = [event.scalars.tolist() for event in run.steps().values()]
    return {name: [row[i] for row in rows] for i, name in enumerate(declared.names)}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_figures_become_metrics_that_are_declared_before_the_first_step(run, accumulation):
    done = started(run, {"capacity": {"kind": "factor", "factor": 1.0, "overflow": "next_best", "padded": True}}, grad_accumulation=accumulation)
    kinds = [type(event).__name__ for event in done.events]
    assert kinds[:3] == ["RunStarted", "MetricsDeclared", "StepDone"] and kinds.count("MetricsDeclared") == 1
    told = scalars(done)
    assert all(0 < share < 1 for share in told["router/rerouted"])
    assert all(share < 0.05 for share in told["dropped_share"])  # only where the last room is at an expert that the token has
    begun = done.events[0]
    assert isinstance(begun, events.RunStarted) and begun.ops["expert_ffn"] == "padded"


def test_every_term_reports_its_value_per_layer_and_its_weight_in_the_sum(run):
    kinds = ("switch_aux", "device_aux", "communication_aux", "sequence_aux", "global_aux", "importance_cv2", "load_cv2", "z_loss")
    balance = [{"kind": kind, "coefficient": 0.5, **({"n_devices": 2} if kind[:3] in ("dev", "com") else {})} for kind in kinds]
    done = started(run, {"router": {"kind": "noisy_topk"}, "balance": balance})
    told = scalars(done)
    for at, event in enumerate(done.steps().values()):
        values = event.tensors["balance_loss"]
        assert values.shape == (2, len(kinds)) and (values > 0).all()
        for term, kind in enumerate(kinds):
            assert told[f"balance/{kind}"][at] == pytest.approx(0.5 * float(values[:, term].sum()), rel=1e-5)
        assert told["loss"][at] == pytest.approx(told["lm_loss"][at] + 0.5 * float(values.sum()), rel=1e-5)
        assert values[:, kinds.index("global_aux")] == pytest.approx(values[:, kinds.index("switch_aux")], rel=1e-5)  # one micro-batch, one rank


@pytest.mark.parametrize(
    ("moe", "dependent"),
    [
        ({}, False),
        ({"capacity": {"kind": "factor", "eval_factor": 1.0}}, True),
        ({"capacity": {"kind": "factor", "eval_factor": 4.0}}, False),
        ({"router": {"kind": "expert_choice"}}, True),
        ({"router": {"kind": "hash"}, "balance": []}, False),
    ],
)
def test_a_validation_tells_whether_logits_depend_on_the_batch(run, moe, dependent):
    done = started(run, moe)
    (found,) = (event.batch_dependence for event in done.events if isinstance(event, events.EvalDone))
    assert found is not None
    assert found > 1e-4 if dependent else found < 1e-5


def test_the_probe_of_the_batch_can_be_left_out(run):
    done = run(model={"moe": MOE}, training={"steps": 2}, telemetry={"probe_batch": False, "spike_window": 8})
    done.go()
    assert [event.batch_dependence for event in done.events if isinstance(event, events.EvalDone)] == [None]


def global_model(*, recompute: bool = False) -> Transformer:
    torch.manual_seed(0)
    spec = tiny(model={"vocab_size": 260, "n_layers": 2, "d_model": 32, "moe": {**MOE, "balance": [{"kind": "global_aux", "coefficient": 0.5}]}})
    model = build_model(spec.model, recompute=recompute).double()
    with torch.no_grad():
        for layer in model._moe_layers():
            layer.router.weight.normal_()  # type: ignore[operator]
    return model


def text(rows: slice) -> Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))[rows]


def balancing_gradient(model: Transformer, micros: list[slice]) -> tuple[list[Tensor], Tensor]:
    """The gradients of the mean of the micro-batches' balancing losses, and the last micro-batch's reported values."""
    model.begin_step()
    for rows in micros:
        output = model(text(rows))
        (output.balance_loss / len(micros)).backward()
    assert output.stats is not None
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return gradients, output.stats.balance_loss_LT


def _rank() -> list[Tensor]:
    rank = dist.get_rank()
    model = global_model()
    gradients, _ = balancing_gradient(model, [slice(2 * rank, 2 * rank + 2)])
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= 2
    model.eval()
    if rank == 0:  # Evaluation must not wait for the other rank.
        model(text(slice(0, 2)))
    return gradients


def test_the_global_term_of_two_ranks_is_that_of_one_process_with_both_batches(tmp_path: Path) -> None:
    found = on_ranks(2, tmp_path, _rank)
    wanted, _ = balancing_gradient(global_model(), [slice(0, 4)])
    assert any(gradient.any() for gradient in wanted)
    for gradients in found:
        for got, right in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, right)


def test_the_global_term_counts_the_micro_batches_so_far_and_forgets_them_with_the_step() -> None:
    model = global_model()
    _, last = balancing_gradient(model, [slice(0, 2), slice(2, 4)])
    whole = model(text(slice(0, 4))).stats
    counts, prob = whole.expert_tokens_LE.double(), model(text(slice(2, 4))).stats.router_prob_LE.double()
    wanted = 4 * (counts / counts.sum(1, keepdim=True) * prob).sum(1)
    torch.testing.assert_close(last[:, 0].double(), wanted, rtol=1e-6, atol=1e-6)
    _, again = balancing_gradient(model, [slice(0, 2), slice(2, 4)])
    torch.testing.assert_close(again, last)
    model.eval()
    alone = model(text(slice(2, 4))).stats
    counts = alone.expert_tokens_LE.double()
    torch.testing.assert_close(alone.balance_loss_LT[:, 0].double(), 4 * (counts / counts.sum(1, keepdim=True) * prob).sum(1), rtol=1e-6, atol=1e-6)


def test_the_global_term_is_the_same_where_activations_are_recomputed() -> None:
    plain, _ = balancing_gradient(global_model(), [slice(0, 2), slice(2, 4)])
    again, _ = balancing_gradient(global_model(recompute=True), [slice(0, 2), slice(2, 4)])
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
