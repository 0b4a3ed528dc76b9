"""The checks of `make gpu`, here in Triton's interpreter: they pass on the kernels and fail on a wrong one."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import device_time, gpu, gpu_layer, gpu_repeats, gpu_routing, kernels, peers
from kernels import experts_grouped, experts_naive, router_triton, tiles_triton
from kernels.router_naive import Routed

SHAPE = (9, 2, 3, 20, 24)


@pytest.fixture(autouse=True)
def _interpretable(monkeypatch):
    """Only float32: the interpreter is slow, and wrong in bfloat16."""
    monkeypatch.setattr(gpu_routing, "MOST_ROUTED", {torch.float32: 1e-5})


def test_the_kernels_pass(monkeypatch):
    monkeypatch.setattr(gpu_layer, "ROUTINGS", ("dropped", "all dropped"))
    errors, failures = gpu_layer.numerics("cpu", torch.float32, (SHAPE,))
    assert failures == []
    assert {"up tf32 float32", "up swiglu tf32x3 float32", "down tf32x3 float32", "combine float32", "expert_ffn swiglu dw_in tf32x3 float32"} <= set(
        errors
    )
    assert all(error < (1e-3 if " tf32 " in name else 1e-5) for name, error in errors.items())


def test_a_wrong_kernel_fails(monkeypatch):
    right = gpu_layer.combine
    monkeypatch.setattr(gpu_layer, "combine", lambda *inputs: right(*inputs) * 1.01)
    monkeypatch.setattr(gpu_layer, "ROUTINGS", ("spread", "all dropped"))
    _, failures = gpu_layer.numerics("cpu", torch.float32, (SHAPE,))
    assert [failure.split(",")[:2] for failure in failures] == [["combine float32", " spread"]]


def test_the_routing_kernels_pass(monkeypatch):
    monkeypatch.setattr(gpu_routing, "ROUTED", {torch.float32: ((9, 16, 3),)})
    errors, failures = gpu_routing.router_numerics("cpu", torch.float32)
    sorted_errors, misplaced = gpu_routing.sorting_numerics("cpu", ("dropped",), ((37, 3, 6),))
    assert failures == misplaced == []
    assert {"tiles", "route softmax order float32", "route groups by best two gradient float32"} <= {*errors, *sorted_errors}


@pytest.mark.parametrize("what", ["expert_TK", "gate_TK", "count_E", "prob_E"])
def test_a_wrong_router_fails(what, monkeypatch):
    right = router_triton.route

    def wrong(*inputs: Any) -> Routed:
        routed = right(*inputs)
        value = getattr(routed, what)
        return routed._replace(**{what: value.flip(-1) if what == "expert_TK" else value * 2})

    monkeypatch.setattr(router_triton, "route", wrong)
    monkeypatch.setattr(gpu_routing, "ROUTED", {torch.float32: ((9, 8, 3),)})
    _, failures = gpu_routing.router_numerics("cpu", torch.float32)
    assert failures


def test_a_wrong_sorting_fails(monkeypatch):
    right = tiles_triton.make_tiles
    monkeypatch.setattr(tiles_triton, "make_tiles", lambda *given: replace(right(*given), slot_R=right(*given).token_R))
    _, failures = gpu_routing.sorting_numerics("cpu", ("spread",), ((37, 3, 6),))
    assert failures == ["tiles, spread, T K E = (37, 3, 6): 1.10e+02 > 0e+00"]


def test_what_is_repeated_gives_tensors(monkeypatch):
    monkeypatch.setattr(gpu_routing, "REPEATED", (64, 16, 2))
    works = gpu_routing.repeated("cpu")
    assert all(torch.equal(a, b) for work in works.values() for a, b in zip(work(), work(), strict=True))


def test_repeats_are_compared_bit_by_bit(monkeypatch):
    drawn = {"equal": lambda: (torch.ones(3),), "drawn": lambda: (torch.rand(3),)}
    monkeypatch.setattr(gpu_repeats, "SMALL", SMALL)
    monkeypatch.setattr(gpu_repeats, "REPEATS", 2)
    monkeypatch.setattr(gpu_routing, "repeated", lambda device: drawn)
    equal, failures = gpu_repeats.determinism("cpu")
    assert equal == {"triton forward+backward": 2, "grouped_mm forward+backward": 2, "equal": 2, "drawn": 0}
    assert failures == ["drawn: 0 of 2 repeats gave the same bits"]


def test_every_part_is_run_and_what_failed_is_told():
    shape = {"tokens": 1}

    def run(name: str, until: float) -> tuple[Any, list[str]]:
        if name == "layer 1":
            return None, ["layer 1: not done after 40 s"]
        if name.startswith("layer "):
            return {"shape": shape, "peers": {"liger": "measured"}, "verdict": {}}, []
        if name.startswith("numerics "):
            return {"up bfloat16": 0.5 if "257x2" in name else 0.25}, []
        return {"name": name}, []

    figures = gpu.collect(run)
    assert figures["failures"] == ["layer 1: not done after 40 s"]
    assert figures["errors"] == {"up bfloat16": 0.5}
    assert [figures[key]["name"] for key in ("graph", "equal_repeats", "training")] == ["graph", "equal repeats", "training"]
    first, second, *_ = figures["benchmark"]["shapes"]
    assert first == {"shape": shape, "verdict": {}} and second["skipped"] and second["shape"]["width"] == 2048
    assert figures["benchmark"]["peers"] == {"liger": "measured"}


def test_a_part_that_fails_or_hangs_takes_nothing_else_away(monkeypatch):
    now = time.monotonic()
    assert gpu.apart("graph", now + 1) == (None, ["graph: not begun, no time was left"])
    monkeypatch.setattr(gpu, "START_S", 0.1)
    assert gpu.apart("graph", now + 0.4) == (None, ["graph: not done after 0 s"])
    if not torch.cuda.is_available():
        figures, failures = gpu.apart("graph", now + 60)
        assert figures is None and len(failures) == 1 and failures[0].startswith("graph: exit code 1: ")


def test_what_does_not_get_ready_is_ended():
    with pytest.raises(TimeoutError, match="not ready after 0 s"), device_time.at_most(0.05):
        time.sleep(5)
    with device_time.at_most(float("inf")):
        time.sleep(0.01)


def test_error_is_relative_and_sees_nan():
    ones = torch.ones(4)
    assert gpu_layer.error(ones * 1.5, ones) == pytest.approx(0.5)
    assert gpu_layer.error(ones, torch.zeros(4)) == pytest.approx(2.0)
    assert gpu_layer.error(torch.tensor([float("nan")]), torch.ones(1)) == 1e30


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_device_says_so(capsys):
    assert gpu.check() == 3
    assert "No CUDA device" in capsys.readouterr().err


SMALL = kernels.Shape(tokens=16, width=16, expert_width=16, experts=4, top_k=2)


def small_layer() -> kernels.Layer:
    torch.manual_seed(0)
    return kernels.Layer.random(SMALL, "cpu")


def test_contestants_compute_the_layer():
    layer = small_layer()
    y, *gradients = layer.moe_and_gradients(experts_grouped.expert_ffn)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in layer.tensors]
    assert y.norm() > 0 and all(gradient.norm() > 0 for gradient in gradients)
    contestants = kernels.contestants(SMALL, layer, {})
    flops = {name: flops for name, (_, flops) in contestants.items()}
    assert flops["dense forward"] == flops["triton forward"] == 6 * 16 * 2 * 16 * 16
    assert flops["dense forward+backward"] == flops["triton forward+backward"] == 3 * flops["dense forward"]
    assert set(flops) == {f"{name} {which}" for name in ("triton", "grouped_mm", "dense") for which in kernels.PASSES}
    for work, _ in (*contestants.values(), *kernels.parts(SMALL, layer).values()):
        work()


def test_the_transformers_experts_are_the_same_layer():
    pytest.importorskip("transformers")
    layer = small_layer()
    wide = kernels.Layer(*(tensor.detach().float().requires_grad_() for tensor in layer.tensors), SMALL.top_k)
    got = wide.gradients(peers.transformers_grouped_mm(wide))
    for a, b in zip(got, wide.moe_and_gradients(experts_naive.expert_ffn), strict=True):
        assert gpu_layer.error(a, b) < 1e-5


def test_peers_that_are_not_there_are_said_to_be_so(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"here": ("json", peers.liger), "not here": ("no_such_package.part", peers.liger)})
    assert peers.installed() == ({"here": peers.liger}, {"not here": "not installed"})


def test_the_verdict_is_against_the_best_peer_and_the_figures_to_reach():
    def row(tflops: float) -> dict[str, float]:
        return {"tflops_per_s": tflops}

    speeds = {"triton": (450, 375), "liger": (400, 380), "grouped_mm": (300, 200), "dense": (600, 600)}
    layers = {f"{name} {which}": row(speed) for name, both in speeds.items() for which, speed in zip(kernels.PASSES, both, strict=True)}
    layers["sonicmoe forward"] = {"error": "out of memory"}  # type: ignore[dict-item]
    first, *_, mixtral = kernels.TARGETS
    forward, both = kernels.verdict(first, layers).values()
    assert forward == {
        "tflops_per_s": 450, "best_peer": "liger", "over_best_peer": 1.125, "over_dense": 0.75, "ahead_of_every_peer": True,
        "floor": 430, "floor_reached": True, "aim": 500, "aim_reached": False,
    }  # fmt: skip
    assert both["ahead_of_every_peer"] is False and both["floor_reached"] is False
    assert "floor" not in kernels.verdict(mixtral, layers)["forward"]
    alone = kernels.verdict(first, {"triton forward": row(1)})["forward"]
    assert alone["best_peer"] is None and alone["ahead_of_every_peer"] is None


def test_only_our_own_failures_fail_the_run():
    measured: dict[str, Any] = {"shape": {"tokens": 1}, "layers": {"triton forward": {"error": "x"}, "liger forward": {"error": "y"}}}
    measured |= {"parts": {"up": {}}, "kept_bytes": {"triton": 10, "liger": 30}, "most_kept_bytes": 20}
    assert gpu.broken(measured) == ["triton forward of {'tokens': 1}: x"]
    measured |= {"layers": {}, "kept_bytes": {"triton": 21}}
    assert gpu.broken(measured) == ["triton of {'tokens': 1} keeps 21 bytes for the backward pass, more than 20"]


def test_what_is_kept_is_asked_of_everybody():
    assert kernels.kept_bytes(small_layer(), kernels.OURS).keys() == {"triton", "grouped_mm"}
    assert SMALL.most_kept_bytes == 2 * 16 * 16 + 4 * 16 * 2 * 16
