"""Every differentiable implementation of the routed feed-forward against the loop over experts, outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch, experts_cpu, experts_grouped, experts_naive, experts_padded
from kernels.activation import GATED, hidden
from tests.kernels.routing import KINDS, choose

Run = Callable[..., Tensor]
ACTIVATIONS = ("swiglu", "geglu", "relu", "gelu", "swiglu_clamped")


def weights(n_experts: int, width: int, d_expert: int, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = 2 * d_expert if activation in GATED else d_expert
    return (
        torch.randn(n_experts, rows, width, dtype=dtype).mul_(width**-0.5).requires_grad_(),
        torch.randn(n_experts, width, d_expert, dtype=dtype).mul_(d_expert**-0.5).requires_grad_(),
    )


def results(run: Run, x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor, activation: str) -> list[Tensor]:
    """The output and the gradients of x, both weights and the gates, for one and the same gradient of the output."""
    y = run(x, w_in, w_out, expert, gate, activation)
    torch.manual_seed(7)
    return [y, *torch.autograd.grad(y, (x, w_in, w_out, gate), torch.randn(y.shape, dtype=torch.float64).to(y.dtype))]


def off_by(got: Tensor, wanted: Tensor) -> float:
    """Relative error of the whole tensor; an absolute one where zeros are wanted."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-6))


def test_the_naive_loop_does_what_the_formula_says():
    torch.manual_seed(0)
    x, gate = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    w_in, w_out = weights(3, 6, 4, "swiglu", torch.float64)
    expert = torch.tensor([[0, 1], [2, 0], [1, 3], [3, 3], [2, 1]])
    got = experts_naive.expert_ffn(x, w_in, w_out, expert, gate, "swiglu")
    for t in range(5):
        wanted = torch.zeros(6, dtype=torch.float64)
        for k in range(2):
            e = int(expert[t, k])
            if e < 3:
                a, b = w_in[e, :4] @ x[t], w_in[e, 4:] @ x[t]
                wanted += gate[t, k] * (w_out[e] @ (a / (1 + torch.exp(-a)) * b))
        torch.testing.assert_close(got[t], wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cpu_path_equals_the_loop_in_float64(kind, activation, monkeypatch):
    monkeypatch.setattr(experts_cpu, "PIECE_BYTES", 2000)  # several pieces even here
    torch.manual_seed(1)
    for n_tokens, top_k, n_experts, width, d_expert in ((37, 3, 6, 14, 10), (1, 1, 4, 8, 3), (65, 2, 9, 5, 7)):
        x = torch.randn(n_tokens, width, dtype=torch.float64, requires_grad=True)
        w_in, w_out = weights(n_experts, width, d_expert, activation, torch.float64)
        gate = torch.rand(n_tokens, top_k, dtype=torch.float64, requires_grad=True)
        args = (x, w_in, w_out, choose(kind, n_tokens, top_k, n_experts), gate, activation)
        for got, wanted in zip(results(experts_cpu.expert_ffn, *args), results(experts_naive.expert_ffn, *args), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", [experts_cpu.expert_ffn, experts_grouped.expert_ffn], ids=["cpu", "grouped_mm"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_products_in_x_dtype_stay_near_float64(kind, run, dtype, most):
    torch.manual_seed(2)
    x = torch.randn(75, 32).to(dtype).requires_grad_()
    w_in, w_out = weights(8, 32, 16, "swiglu", torch.float32)
    gate = torch.rand(75, 2, requires_grad=True)
    expert = choose(kind, 75, 2, 8)
    got = results(run, x, w_in, w_out, expert, gate, "swiglu")
    exact = [t.detach().double().requires_grad_() for t in (x, w_in, w_out)]
    wanted = results(experts_naive.expert_ffn, *exact, expert, gate.detach().double().requires_grad_(), "swiglu")
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32, torch.float32]
    for name, a, b in zip(("y", "dx", "dw_in", "dw_out", "dgate"), got, wanted, strict=True):
        assert off_by(a, b) < most, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    torch.manual_seed(3)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    w_in, w_out = weights(3, 4, 3, activation, torch.float64)
    gate = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    expert = choose("dropped", 7, 2, 3)
    assert torch.autograd.gradcheck(lambda *args: experts_cpu.expert_ffn(*args[:3], expert, args[3], activation), (x, w_in, w_out, gate))


def test_a_token_computes_the_same_whoever_shares_its_batch():
    """Dropless experts: what another token holds must not leak, not even NaN."""
    torch.manual_seed(4)
    w_in, w_out = weights(4, 8, 8, "swiglu", torch.float32)
    x, expert, gate = torch.randn(40, 8), choose("spread", 40, 2, 4), torch.rand(40, 2)
    alone = dispatch.expert_ffn(x, w_in, w_out, expert, gate, "swiglu")
    x[20:] = float("nan")
    torch.testing.assert_close(dispatch.expert_ffn(x, w_in, w_out, expert, gate, "swiglu")[:20], alone[:20])


def test_the_cpu_path_repeats_to_the_bit():
    torch.manual_seed(5)
    x = torch.randn(300, 32, requires_grad=True)
    w_in, w_out = weights(8, 32, 24, "swiglu", torch.float32)
    args = (x, w_in, w_out, choose("spread", 300, 2, 8), torch.rand(300, 2, requires_grad=True), "swiglu")
    first = results(experts_cpu.expert_ffn, *args)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, results(experts_cpu.expert_ffn, *args), strict=True))


def test_the_clamped_activation_is_its_formula_within_and_beyond_its_limits():
    gate, up = (torch.tensor(values, dtype=torch.float64) for values in ([-9.0, 0.5, 7.0, 20.0, 3.0], [9.0, -0.5, 7.0, -20.0, 2.0]))
    for g, u, got in zip(gate.tolist(), up.tolist(), hidden(torch.cat((gate, up)), "swiglu_clamped").tolist(), strict=True):
        g, u = min(g, 7.0), max(-7.0, min(u, 7.0))
        assert got == pytest.approx(g / (1 + math.exp(-1.702 * g)) * (u + 1), rel=1e-12)


def padded(*args: object) -> Tensor:
    expert, n_experts = args[3], len(args[1])  # type: ignore[arg-type]
    assert isinstance(expert, Tensor)
    busiest = int(torch.bincount(expert.flatten(), minlength=n_experts + 1)[:n_experts].max())
    return experts_padded.expert_ffn(*args, capacity=max(1, busiest))  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("run", [experts_cpu.expert_ffn, experts_grouped.expert_ffn, padded], ids=["cpu", "grouped_mm", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["swiglu_clamped", "relu"])
@pytest.mark.parametrize("biased", [True, False])
def test_biases_and_clamps_equal_the_loop_in_float64(run, kind, activation, biased, monkeypatch):
    monkeypatch.setattr(experts_cpu, "PIECE_BYTES", 2000)
    torch.manual_seed(8)
    dtype = torch.float32 if run is experts_grouped.expert_ffn else torch.float64
    x = (6 * torch.randn(37, 16)).to(dtype).requires_grad_()  # far enough to be clamped
    w_in, w_out = weights(5, 16, 8, activation, torch.float64)
    b_in = torch.randn(5, w_in.shape[1], dtype=torch.float64, requires_grad=True) if biased else None
    gate = torch.rand(37, 2, dtype=torch.float64, requires_grad=True)
    expert = choose(kind, 37, 2, 5)
    inputs = [x, w_in, w_out, gate, *([b_in] if b_in is not None else [])]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = run(x, w_in, w_out, expert, gate, activation, b_in)
    wanted = experts_naive.expert_ffn(*exact[:3], expert, exact[3], activation, exact[4] if biased else None)
    d = torch.randn(y.shape, dtype=torch.float64)
    got = [y, *torch.autograd.grad(y, inputs, d.to(dtype))]
    for name, a, b in zip(("y", "dx", "dw_in", "dw_out", "dgate", "db_in"), got, [wanted, *torch.autograd.grad(wanted, exact, d)], strict=False):
        assert off_by(a, b) < (1e-5 if dtype == torch.float32 else 1e-10), name


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="swish"):
        hidden(torch.ones(2), "swish")


def test_the_run_page_is_told_what_runs(monkeypatch):
    assert dispatch.implementations("cpu", torch.float32) == {"expert_ffn": "cpu", "router": "torch", "attention": "sdpa", "rms_norm": "cpu"}
    assert dispatch.implementations("cpu", padded=True)["expert_ffn"] == dispatch.implementations("cuda", padded=True)["expert_ffn"] == "padded"
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    assert dispatch.implementations("cpu", scored=(8, 2))["router"] == "torch"
    assert dispatch.implementations("cuda", scored=(128, 8))["router"] == "triton"
    assert dispatch.implementations("cuda", scored=(2048, 8))["router"] == "torch"  # a row of scores is one tile
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert dispatch.implementations("cuda", dtype, aligned=False)["expert_ffn"] == "triton"
    assert dispatch.implementations("cuda", torch.float64)["expert_ffn"] == "naive"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.implementations("cuda", torch.bfloat16, aligned=dispatch.is_aligned(64, 96))["expert_ffn"] == "grouped_mm"
    assert dispatch.implementations("cuda", torch.bfloat16, aligned=dispatch.is_aligned(64, 100))["expert_ffn"] == "naive"  # 200 bytes


def test_what_runs_the_experts_on_a_gpu_can_be_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    for wanted in ("triton", "grouped_mm", "naive"):
        monkeypatch.setattr(dispatch, "WANTED", wanted)
        assert dispatch.implementations("cuda", torch.bfloat16)["expert_ffn"] == wanted
        assert dispatch.implementations("cpu", torch.bfloat16)["expert_ffn"] == "cpu"
    monkeypatch.setattr(dispatch, "WANTED", "grouped_mm")
    with pytest.raises(ValueError, match="MOELAB_EXPERTS is 'grouped_mm'; what can run experts in float32 on cuda here: triton, naive"):
        dispatch.implementations("cuda", torch.float32)
    monkeypatch.setattr(dispatch, "WANTED", "cutlass")
    with pytest.raises(ValueError, match="cutlass"):
        dispatch.implementations("cuda", torch.bfloat16)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_the_loop_multiplies_in_the_dtype_of_the_tokens(activation):
    """On CUDA it also runs bfloat16 tokens through float32 weights whose rows no grouped product takes."""
    x_TD, expert_TK, gate_TK = torch.randn(5, 6).bfloat16(), torch.tensor([[0], [1], [2], [0], [1]]), torch.ones(5, 1)
    w_in, w_out = torch.randn(2, 14 if activation == "swiglu" else 7, 6), torch.randn(2, 6, 7)
    y = experts_naive.expert_ffn(x_TD, w_in, w_out, expert_TK, gate_TK, activation)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, experts_naive.expert_ffn(x_TD, w_in.bfloat16(), w_out.bfloat16(), expert_TK, gate_TK, activation))
