"""What the MoE layer hands to the Triton experts: capacity, expert choice, gates on the input, biases; against the CPU path on the same layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import dispatch, experts_triton
from moe.context import Context
from moe.layer import MoeLayer
from moe.rope import Rope
from moe.router_expert_choice import ExpertChoiceRouter
from spec.model import Model

D, E = 16, 4


def layer_of(dtype: torch.dtype = torch.float32, **moe: Any) -> MoeLayer:
    described = {"n_experts": E, "top_k": 2, "d_expert": 16, "balance": [], **moe}
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2, "head_dim": 4}
    model = {"d_model": D, "n_layers": 1, "vocab_size": 32, "d_ff": 12, "attention": attention, "moe": described}
    layer = MoeLayer(Model.model_validate(model)).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    return layer


def results(layer: MoeLayer, x_BSD: Tensor) -> list[Tensor]:
    """The layer's output and the gradients of its input and all its parameters."""
    tokens = torch.arange(x_BSD.shape[0] * x_BSD.shape[1]).view(x_BSD.shape[:2])
    y = layer(x_BSD, Context(tokens, Rope(x_BSD.shape[1], 4, 1e4, x_BSD.device))).y_BSD
    return [y, *torch.autograd.grad(y.square().sum(), (x_BSD, *layer.parameters()))]


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[Any, ...]]]:
    """Has the layer take the experts of a CUDA device from the call on; gives the list of what these are then called with."""
    ran = experts_triton.expert_ffn
    calls: list[tuple[Any, ...]] = []

    def switch() -> list[tuple[Any, ...]]:
        monkeypatch.setattr(dispatch, "_expert_ffn", lambda *args, **kwargs: "triton")
        monkeypatch.setattr(experts_triton, "expert_ffn", lambda *args: (calls.append(args), ran(*args))[1])
        monkeypatch.setattr(ExpertChoiceRouter, "width", lambda self, taken_TE: self.n_experts)
        return calls

    return switch


FORMS: dict[str, dict[str, Any]] = {
    "dropped by position": {"capacity": {"kind": "factor", "factor": 0.5}},
    "dropped by probability, biased": {
        "capacity": {"kind": "factor", "factor": 0.75, "drop": "probability"},
        "bias": "expert",
        "activation": "swiglu_clamped",
    },
    "offered on": {"capacity": {"kind": "factor", "factor": 1.0, "overflow": "next_best"}},
    "expert choice": {"router": {"kind": "expert_choice"}},
    "gates on the input": {"router": {"kind": "sigmoid_input"}, "top_k": 1, "capacity": {"kind": "factor", "factor": 1.0}},
    "gates on the input of two": {"router": {"kind": "sigmoid_input"}},
    "all experts": {"router": {"kind": "all_experts"}, "top_k": E},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_is_the_same_on_triton(form, on_triton):
    torch.manual_seed(0)
    layer, x = layer_of(**FORMS[form]), torch.randn(1, 21, D, requires_grad=True)
    wanted = results(layer, x)
    calls = on_triton()
    got = results(layer, x)
    assert len(calls) == 1
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm().clamp_min(1e-6)


def test_expert_choice_takes_memory_for_what_experts_take(on_triton):
    """Off the CPU every expert is a slot of every token, of which all but E * C are empty."""
    layer, calls = layer_of(router={"kind": "expert_choice"}), on_triton()
    results(layer, torch.randn(1, 21, D, requires_grad=True))
    *_, expert_TK, _gate, _activation, _bias, most_rows, _casts = calls[0]
    assert expert_TK.shape == (21, E) and most_rows == E * 11  # 11 = ceil(2 * 21 / 4)
    assert int((expert_TK < E).sum()) == most_rows


def test_half_precision(on_triton):
    torch.manual_seed(0)
    layer, x = layer_of(bias="expert", activation="swiglu_clamped"), torch.randn(40, D)
    expert_TK, gate_TK = torch.rand(40, E).argsort(-1)[:, :2], torch.rand(40, 2)
    wanted = layer.experts(x, expert_TK, gate_TK).y_TD
    on_triton()
    got = layer.experts(x.half(), expert_TK, gate_TK).y_TD
    assert got.dtype == torch.float16
    assert (got - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.slow
def test_it_compiles_without_a_graph_break(on_triton, monkeypatch):
    """As `moe.experts` calls it, what chooses the implementation included, forward and backward."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    torch.manual_seed(0)
    layer, x = layer_of(bias="expert", activation="swiglu_clamped"), torch.randn(21, D, requires_grad=True)
    expert_TK, gate_TK = torch.rand(21, E).argsort(-1)[:, :2], torch.rand(21, 2, requires_grad=True)
    chosen = dispatch._expert_ffn
    on_triton()

    def run(x_TD: Tensor, gate_TK: Tensor) -> Tensor:
        assert chosen("cuda", x_TD.dtype, aligned=dispatch.is_aligned(D, 16)) == "triton"
        return dispatch.expert_ffn(x_TD, layer.experts.w_in, layer.experts.w_out, expert_TK, gate_TK, "swiglu_clamped", layer.experts.b_in)

    inputs = (x, gate_TK, layer.experts.w_in, layer.experts.w_out, layer.experts.b_in)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [(y := each(x, gate_TK), *torch.autograd.grad(y.square().sum(), inputs)) for each in (compiled, run)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
