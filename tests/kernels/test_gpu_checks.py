"""The checks of `make gpu`, here in Triton's interpreter: they pass on the kernels and fail on a wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_routing, kernels
from kernels import combine_triton, experts_grouped, router_triton, tiles_triton
from kernels.router_naive import Routed

SHAPE = (9, 2, 3, 20, 24)


@pytest.fixture(autouse=True)
def _interpretable(monkeypatch):
    """Only float32: the interpreter is slow, and wrong in bfloat16."""
    monkeypatch.setattr(gpu, "MOST", {torch.float32: 1e-3})
    monkeypatch.setattr(gpu_routing, "MOST_ROUTED", {torch.float32: 1e-5})


def test_the_kernels_pass(monkeypatch):
    monkeypatch.setattr(gpu, "ROUTINGS", ("spread", "dropped", "all dropped"))
    errors, failures = gpu.numerics("cpu", (SHAPE,))
    assert failures == []
    assert {"up tf32 float32", "up swiglu ieee float32", "down ieee float32", "combine float32", "expert_ffn swiglu float32"} <= set(errors)
    assert all(error < 1e-5 for error in errors.values())


def test_a_wrong_kernel_fails(monkeypatch):
    right = combine_triton.combine
    monkeypatch.setattr(combine_triton, "combine", lambda *inputs: right(*inputs) * 1.01)
    monkeypatch.setattr(gpu, "ROUTINGS", ("spread", "all dropped"))
    _, failures = gpu.numerics("cpu", (SHAPE,))
    assert [failure.split(",")[:2] for failure in failures] == [["combine float32", " spread"]]


def test_the_routing_kernels_pass(monkeypatch):
    monkeypatch.setattr(gpu_routing, "ROUTED", {torch.float32: ((9, 16, 3),)})
    errors, failures = gpu_routing.numerics("cpu", ("dropped",), ((37, 3, 6),))
    assert failures == []
    assert {"tiles", "route softmax order float32", "route groups by best two gradient float32"} <= set(errors)


@pytest.mark.parametrize("what", ["expert_TK", "gate_TK", "count_E", "prob_E"])
def test_a_wrong_router_fails(what, monkeypatch):
    right = router_triton.route

    def wrong(*inputs: Any) -> Routed:
        routed = right(*inputs)
        value = getattr(routed, what)
        return routed._replace(**{what: value.flip(-1) if what == "expert_TK" else value * 2})

    monkeypatch.setattr(router_triton, "route", wrong)
    monkeypatch.setattr(gpu_routing, "ROUTED", {torch.float32: ((9, 8, 3),)})
    _, failures = gpu_routing.numerics("cpu", (), ())
    assert failures


def test_a_wrong_sorting_fails(monkeypatch):
    right = tiles_triton.make_tiles
    monkeypatch.setattr(tiles_triton, "make_tiles", lambda *given: replace(right(*given), slot_R=right(*given).token_R))
    monkeypatch.setattr(gpu_routing, "ROUTED", {torch.float32: ()})
    _, failures = gpu_routing.numerics("cpu", ("spread",), ((37, 3, 6),))
    assert failures == ["tiles, spread, T K E = (37, 3, 6): 1.10e+02 > 0e+00"]


def test_what_is_repeated_gives_tensors(monkeypatch):
    monkeypatch.setattr(gpu_routing, "REPEATED", (64, 16, 2))
    works = gpu_routing.repeated("cpu")
    assert all(torch.equal(a, b) for work in works.values() for a, b in zip(work(), work(), strict=True))


def test_error_is_relative_and_sees_nan():
    ones = torch.ones(4)
    assert gpu.error(ones * 1.5, ones) == pytest.approx(0.5)
    assert gpu.error(ones, torch.zeros(4)) == pytest.approx(2.0)
    assert gpu.error(torch.tensor([float("nan")]), torch.ones(1)) == 1e30


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_device_says_so(capsys):
    assert gpu.check() == 3
    assert "No CUDA device" in capsys.readouterr().err


def test_contestants_compute_the_layer():
    shape = kernels.Shape(tokens=32, width=32, expert_width=16, experts=4, top_k=2)
    torch.manual_seed(0)
    layer = kernels.Layer.random(shape, "cpu")
    y, *gradients = layer.moe_and_gradients(experts_grouped.expert_ffn)
    assert [gradient.shape for gradient in gradients] == [layer.x_TD.shape, layer.w_router_ED.shape, layer.w_in_EHD.shape, layer.w_out_EDF.shape]
    assert y.norm() > 0
    assert all(gradient.norm() > 0 for gradient in gradients)
    flops = {name: flops for name, (_, flops) in kernels.contestants(shape, layer).items()}
    assert flops["dense forward"] == flops["triton usual forward"] == 6 * 32 * 2 * 16 * 32
    assert flops["dense forward+backward"] == 3 * flops["dense forward"]
