"""The benchmark of a training step on a GPU, at nano size on a CPU: it runs, and what it reckons follows from what it timed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import train_gpu
from moe.train.loop import Training
from spec.accounting import price

NANO = train_gpu.Shape(layers=2, width=32, heads=2, experts=4, top_k=2, expert_width=16, vocabulary=300, micro_batches=2, sequences=1, length=24)


def test_its_figures_follow_from_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(train_gpu, "peak_flop_per_s", lambda name, precision: 1e12)
    found = train_gpu.benchmark(NANO, "cpu", rounds=2)
    assert json.loads(json.dumps(found)) == found
    assert found["errors"] == {} and set(found["step_ms"]) == {"ours", "grouped_mm", "eager"}
    flops = price(train_gpu.spec_of(NANO)).flops_per_token.training
    assert found["flops_per_token"] == flops
    step_ms = {name: series["median"] for name, series in found["step_ms"].items()}
    assert found["tokens_per_s"]["ours"] == pytest.approx(48_000 / step_ms["ours"], rel=1e-3)
    targets = found["targets"]
    assert targets["mfu"]["value"] == pytest.approx(flops * 48 / step_ms["ours"] / 1e9, rel=1e-3)
    assert targets["ratio"]["value"] == pytest.approx(min(step_ms["grouped_mm"], step_ms["eager"]) / step_ms["ours"], rel=1e-3)
    assert found["peer"] == min(("grouped_mm", "eager"), key=lambda name: step_ms[name])
    assert [targets[name]["target"] for name in ("mfu", "ratio", "telemetry_percent")] == [0.35, 1.3, 1.0]
    assert all(targets[name]["reached"] is (targets[name]["value"] >= targets[name]["target"]) for name in ("mfu", "ratio"))
    assert targets["telemetry_percent"]["reached"] is (targets["telemetry_percent"]["value"] <= 1)
    assert targets["waits"] == {"value": None, "target": 0, "reached": None}


def test_both_models_are_of_one_size() -> None:
    batches, device = train_gpu.random_batches(NANO), torch.device("cpu")
    peer = train_gpu.Theirs(NANO, batches, device)
    assert sum(parameter.numel() for parameter in peer.model.parameters()) == price(train_gpu.spec_of(NANO)).total_params


def test_the_stack_is_what_its_docstring_says_and_two_of_it_fit() -> None:
    cost = price(train_gpu.spec_of(train_gpu.STACK))
    assert cost.total_params == pytest.approx(1.9e9, rel=0.02)
    assert 2 * (cost.bytes.weights + cost.bytes.gradients + cost.bytes.optimizer) < 62e9


def test_a_contestant_that_does_not_run_is_told_and_left_out() -> None:
    def fails() -> None:
        raise RuntimeError("no such kernel\nat length")

    times, errors = train_gpu.take_turns({"works": lambda: None, "fails": fails}, torch.device("cpu"), 3, float("inf"))
    assert errors == {"fails": "RuntimeError: no such kernel"} and len(times["works"]) == 3


def test_ours_that_does_not_run_is_told_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Training) -> None:
        raise RuntimeError("no such kernel")

    torch.set_num_threads(1)
    monkeypatch.setattr(Training, "train_step", fails)
    found = train_gpu.benchmark(NANO, "cpu", rounds=3, seconds=0.0)
    assert found["errors"] == {"ours": "RuntimeError: no such kernel"} and found["peer"] in ("grouped_mm", "eager")
    assert found["tflop_per_s"] is None and all(target["value"] is None and target["reached"] is None for target in found["targets"].values())
