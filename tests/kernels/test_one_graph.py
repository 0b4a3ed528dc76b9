"""The layer on its Triton operations is one graph to torch.compile: nothing in it asks the device for a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import dispatch, experts_triton, router_triton, tiles_triton
from kernels.router_naive import Rule
from moe.context import Context
from moe.layer import MoeLayer
from moe.rope import Rope
from spec import presets
from spec.model import Model

pytestmark = pytest.mark.usefixtures("poisoned")


def compiled(work: Any) -> Any:
    """Refuses (fullgraph) what it cannot trace, as a read of a value would be."""
    torch._dynamo.reset()
    return torch.compile(work, fullgraph=True, backend="aot_eager")


def equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_router_and_experts(monkeypatch):
    monkeypatch.setattr(experts_triton, "make_tiles", tiles_triton.make_tiles)
    x, w_router = torch.randn(11, 16, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    w_in, w_out = torch.randn(6, 24, 16, requires_grad=True), torch.randn(6, 16, 12, requires_grad=True)
    rule = Rule(2, "sigmoid", "normalised", n_groups=2, top_groups=1, group_score="top2_sum")
    bias = torch.rand(6)

    def layer(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routed = router_triton.route(x @ w_router.T, bias, rule)
        y = experts_triton.expert_ffn(x, w_in, w_out, routed.expert_TK, routed.gate_TK, "swiglu")
        return y, 6 * (routed.count_E.float() / 22) @ routed.prob_E, routed.prob_TE.mean(0)

    results = []
    for run in (layer, compiled(layer)):
        y, loss, prob = run(x)
        total = (y * torch.arange(16.0)).sum() + loss + (prob * torch.arange(6.0)).sum()
        results.append((y, loss, prob, *torch.autograd.grad(total, (x, w_router, w_in, w_out))))
    equal(*results)


def shrunk(model: Model) -> Model:
    """A width and as many experts as the interpreter can take."""
    assert model.moe is not None
    return model.model_copy(update={"d_model": 16, "moe": model.moe.model_copy(update={"n_experts": 8, "d_expert": 12})})


@pytest.mark.parametrize(("preset", "training"), [("nano-mixtral", True), ("nano-deepseek-v3", True), ("nano-llama-4", False)])
def test_the_models_layer_with_its_losses_and_statistics(preset, training, monkeypatch):
    """As a CUDA device runs it: the operations that are chosen there."""
    monkeypatch.setattr(dispatch, "_route", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "_expert_ffn", lambda *_, **__: "triton")
    layer = MoeLayer(shrunk(presets.load(preset).model)).train(training)
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    context = Context(torch.randint(0, 200, (2, 5)), Rope(5, 4, 1e4, torch.device("cpu")))
    x = torch.randn(2, 5, 16, requires_grad=True)
    results = []
    for run in (layer, compiled(layer)):
        output = run(x, context)
        gradients = torch.autograd.grad(output.y_BSD.square().sum() + output.loss, (x, *layer.parameters()))
        figures = [part for part in output.stats if isinstance(part, Tensor)]
        results.append((output.y_BSD, output.loss, output.choice.expert_TK, *figures, *gradients))
    equal(*results)


def test_the_choice_of_an_implementation_is_traced(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    run = compiled(lambda x: x + (1 if dispatch._route("cuda", torch.float32, 8, 2) == "triton" else 0))
    assert torch.equal(run(torch.zeros(2)), torch.ones(2))
