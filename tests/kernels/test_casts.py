"""Weights that somebody has cast already give what every implementation makes of the weights themselves, to the last bit."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch

T, D, F, E, K = 21, 16, 24, 4, 2
CASES = {"cpu": None, "triton": None, "grouped_mm": None, "naive": None, "padded": T * K}


def results(run: Any, *weights: Tensor) -> list[Tensor]:
    """The layer's output in bfloat16, and the gradients of its input and its float32 weights."""
    torch.manual_seed(1)
    x_TD, expert_TK, gate_TK = torch.randn(T, D).bfloat16().requires_grad_(), torch.rand(T, E + 1).argsort(-1)[:, :K], torch.rand(T, K)
    y_TD = run(x_TD, *weights, expert_TK, gate_TK, "swiglu")
    return [y_TD, *torch.autograd.grad(y_TD.float().square().sum(), (x_TD, *weights))]


@pytest.mark.parametrize("which", CASES)
def test_nothing_changes_and_gradients_are_the_weights_own(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_expert_ffn", lambda *_, **__: which)
    torch.manual_seed(0)
    weights = [torch.randn(E, 2 * F, D, requires_grad=True), torch.randn(E, D, F, requires_grad=True)]
    run = partial(dispatch.expert_ffn, capacity=CASES[which])
    wanted = results(run, *weights)
    w_in, w_out = (weight.detach().bfloat16() for weight in weights)
    got = results(partial(run, casts=(w_in, w_out)), *weights)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert [gradient.dtype for gradient in got[2:]] == [torch.float32] * 2
    zeros = torch.zeros_like(w_in), torch.zeros_like(w_out)
    assert not results(partial(run, casts=zeros), *weights)[0].any(), "the casts are what is multiplied"
