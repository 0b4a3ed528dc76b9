"""The Triton kernels in Triton's interpreter against their plain-torch twins. Memory that a kernel may not read holds NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from kernels import experts_naive, experts_triton, grouped_gemm_naive
from kernels.combine_triton import combine
from kernels.grouped_gemm_triton import Blocks, grouped_gemm, make_tiles
from tests.kernels.routing import KINDS, choose

SMALL = Blocks(rows=16, outer=16, inner=16, warps=4, stages=1)
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
@pytest.mark.parametrize(("gather", "swiglu"), [(True, True), (True, False), (False, False)])
def test_grouped_gemm_equals_its_twin(kind, shape, gather, swiglu):
    n_tokens, top_k, n_experts, n_inner, n_outer = shape
    expert = choose(kind, n_tokens, top_k, n_experts)
    tiles = make_tiles(expert, n_experts, SMALL.rows)
    a = torch.randn(n_tokens if gather else n_tokens * top_k, n_inner)
    kept = int((expert < n_experts).sum())
    if not gather:
        a[kept:] = float("nan")
    w = torch.randn(n_experts, 2 * n_outer if swiglu else n_outer, n_inner)
    got = grouped_gemm(a, w, tiles, gather=gather, swiglu=swiglu, blocks=SMALL)
    wanted = grouped_gemm_naive.grouped_gemm(a, w, tiles.token_R, tiles.end_E.tolist(), gather=gather, swiglu=swiglu)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "dtype", "most"), [("swiglu", torch.float32, 1e-5), ("swiglu", torch.bfloat16, 1e-2), ("relu", torch.float32, 1e-5)]
)
def test_the_whole_feed_forward_equals_the_loop(kind, activation, dtype, most):
    x, gate = torch.randn(33, 20).to(dtype), torch.rand(33, 2)
    rows = 48 if activation == "swiglu" else 24
    w_in, w_out = torch.randn(5, rows, 20).mul_(0.2).to(dtype), torch.randn(5, 20, 24).mul_(0.2).to(dtype)
    expert = choose(kind, 33, 2, 5)
    got = experts_triton.expert_ffn(x, w_in, w_out, expert, gate, activation, SMALL)
    wanted = experts_naive.expert_ffn(x.double(), w_in.double(), w_out.double(), expert, gate.double(), activation)
    assert (got.double() - wanted).norm() <= most * wanted.norm()
