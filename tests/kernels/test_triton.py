"""The Triton kernels in Triton's interpreter against their plain-torch twins. Memory that a kernel may not read holds NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from kernels import blocks, experts_naive, experts_triton, grouped_gemm_naive
from kernels.activation import GATED
from kernels.combine_triton import combine
from kernels.grouped_gemm_triton import grouped_gemm, make_tiles
from tests.kernels.routing import KINDS, choose

SMALL = blocks.SMALL.up
SHAPES = [(37, 3, 6, 20, 24), (1, 1, 4, 16, 16), (16, 2, 3, 33, 17)]  # T, K, E, A, B


@pytest.fixture(autouse=True)
def _bfloat16_dots(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bfloat16 operands (triton-lang/triton, issue 11584): widen them first."""
    plain = interpreter.InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN, so that reading what was never written shows."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gather", "activation"), [(True, "swiglu"), (True, "none"), (False, "none"), (True, "gelu")])
def test_grouped_gemm_equals_its_twin(kind, shape, gather, activation):
    n_tokens, top_k, n_experts, n_inner, n_outer = shape
    expert = choose(kind, n_tokens, top_k, n_experts)
    tiles = make_tiles(expert, n_experts, SMALL.rows)
    a = torch.randn(n_tokens if gather else n_tokens * top_k, n_inner)
    kept = int((expert < n_experts).sum())
    if not gather:
        a[kept:] = float("nan")
    w = torch.randn(n_experts, 2 * n_outer if activation in GATED else n_outer, n_inner)
    got = grouped_gemm(a, w, tiles, gather=gather, activation=activation, blocks=SMALL)
    wanted = grouped_gemm_naive.grouped_gemm(a, w, tiles.token_R, tiles.end_E.tolist(), gather=gather, activation=activation)
    torch.testing.assert_close(got[:kept], wanted[:kept], rtol=1e-4, atol=1e-4)
    assert got[kept:].isnan().all()  # nothing was written there


def test_grouped_gemm_takes_any_strides():
    expert = choose("spread", 20, 2, 4)
    tiles = make_tiles(expert, 4, SMALL.rows)
    a, w = torch.randn(24, 20).t(), torch.randn(4, 24, 18).transpose(1, 2)
    got = grouped_gemm(a, w, tiles, gather=True, blocks=SMALL)
    wanted = grouped_gemm_naive.grouped_gemm(a, w, tiles.token_R, tiles.end_E.tolist(), gather=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_cover_each_experts_rows_once(kind):
    expert = choose(kind, 50, 2, 5)
    tiles = make_tiles(expert, 5, 16)
    covered, start = [], 0
    for e, end in enumerate(tiles.end_E.tolist()):
        starts = tiles.start_M[tiles.expert_M == e].tolist()
        assert starts == list(range(start, end, 16))
        covered += starts
        start = end
    assert len(covered) == int((tiles.expert_M < 5).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 16, 1500])
def test_combine_sums_the_kept_rows(kind, width):
    expert = choose(kind, 19, 3, 4)
    tiles = make_tiles(expert, 4, 16)
    y, gate = torch.randn(57, width), torch.rand(19, 3)
    kept = int((expert < 4).sum())
    y[kept:] = float("nan")
    got = combine(y, tiles.row_TK, gate, tiles.end_E[-1:])
    wanted = torch.zeros(19, width)
    for t in range(19):
        for k in range(3):
            if expert[t, k] < 4:
                wanted[t] += gate[t, k] * y[tiles.row_TK[t, k]]
    torch.testing.assert_close(got, wanted)


def layer(activation: str, dtype: torch.dtype, kind: str, n_tokens: int = 33) -> tuple[Any, ...]:
    """Inputs of `expert_ffn` that want gradients; x and the products in `dtype`, odd sizes."""
    x = torch.randn(n_tokens, 20).to(dtype).requires_grad_()
    rows = 46 if activation in GATED else 23
    w_in = torch.randn(5, rows, 20).mul_(0.4).to(dtype).requires_grad_()
    w_out = torch.randn(5, 20, 23).mul_(0.4).to(dtype).requires_grad_()
    return x, w_in, w_out, choose(kind, n_tokens, 2, 5), torch.rand(n_tokens, 2).requires_grad_(), activation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "dtype", "most"),
    [
        ("swiglu", torch.float32, 1e-5),
        ("swiglu", torch.bfloat16, 2e-2),
        *((name, torch.float32, 1e-5) for name in ("geglu", "relu", "gelu", "swiglu_clamped")),
    ],
)
def test_output_and_gradients_equal_the_loop(kind, activation, dtype, most):
    """The interpreter truncates where it casts to bfloat16, which a device rounds: hence twice the error that `make gpu` allows."""
    x, w_in, w_out, expert, gate, _ = given = layer(activation, dtype, kind)
    exact = [t.detach().double().requires_grad_() for t in (x, w_in, w_out, gate)]
    got = experts_triton.expert_ffn(*given)
    wanted = experts_naive.expert_ffn(*exact[:3], expert, exact[3], activation)
    slope = torch.randn(got.shape).to(dtype)
    gradients = torch.autograd.grad(got, (x, w_in, w_out, gate), slope)
    for name, a, b in zip(
        ("y", "dx", "dw_in", "dw_out", "dgate"), (got, *gradients), (wanted, *torch.autograd.grad(wanted, exact, slope.double())), strict=True
    ):
        assert (a.double() - b).norm() <= most * b.norm().clamp_min(1e-6), name


def test_the_operation_is_registered_as_torch_asks():
    x, w_in, w_out, expert, gate, activation = layer("swiglu", torch.float32, "dropped")
    given = (x, w_in, w_out, expert, gate, None, activation, 66, True)
    torch.library.opcheck(experts_triton._expert_ffn, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_only_input_and_hidden_layer_are_kept():
    """2 T D + 4 T K F bytes in bfloat16, beside the weights and the routing."""
    x, w_in, w_out, expert, gate, _ = given = layer("swiglu", torch.bfloat16, "spread", 64)
    kept: list[int] = []
    beside = {t.untyped_storage().data_ptr() for t in (w_in, w_out, expert, gate)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in beside:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts_triton.expert_ffn(*given)
    assert sum(kept) == 2 * 64 * 20 + 4 * 64 * 2 * 23


def test_evaluation_keeps_nothing():
    with torch.no_grad():
        x, w_in, w_out, expert, gate, activation = layer("swiglu", torch.float32, "dropped")
        _, h = experts_triton._expert_ffn(x, w_in, w_out, expert, gate, None, activation, 66, False)
    assert h.shape == (0, 46)
