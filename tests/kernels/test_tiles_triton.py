"""The sorting by expert in Triton's interpreter against a loop over assignments, and against its twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels import experts_naive, experts_triton, grouped_gemm_triton, tiles_triton
from tests.kernels.routing import KINDS, choose

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 1, 1), (1, 4, 4), (50, 2, 5), (37, 3, 70), (130, 8, 8)]  # T, K, E
TILE_ROWS = 16


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    """So that few assignments make several of them."""
    monkeypatch.setattr(tiles_triton, "BLOCK", 64)


def check(expert: Tensor, n_experts: int) -> None:
    """Rows by expert, within one in the order of assignments, dropped ones last; each tile once, then those without work."""
    got, twin = (make(expert, n_experts, TILE_ROWS) for make in (tiles_triton.make_tiles, grouped_gemm_triton.make_tiles))
    flat = expert.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))
    assert got.slot_R.tolist() == order
    assert got.token_R.tolist() == [slot // expert.shape[1] for slot in order]
    assert [order[row] for row in got.row_TK.flatten().tolist()] == list(range(len(flat)))
    assert got.end_E.tolist() == [sum(e <= expert_here for e in flat) for expert_here in range(n_experts)]
    tiles, start = [], 0
    for e, end in enumerate(got.end_E.tolist()):
        tiles += [(e, row) for row in range(start, end, TILE_ROWS)]
        start = end
    assert list(zip(got.expert_M.tolist(), got.start_M.tolist(), strict=True))[: len(tiles)] == tiles
    assert got.expert_M.tolist()[len(tiles) :] == [n_experts] * (len(got.expert_M) - len(tiles))
    assert got.used_1.tolist() == twin.used_1.tolist() == [len(tiles)]
    for name, mine in vars(got).items():
        theirs = getattr(twin, name)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_a_loop_over_assignments(shape, kind):
    n_tokens, top_k, n_experts = shape
    check(choose(kind, n_tokens, top_k, n_experts), n_experts)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 40), st.integers(1, 5), st.integers(1, 33))
def test_any_assignment(data, n_tokens, top_k, n_experts):
    row = st.lists(st.integers(0, n_experts), min_size=top_k, max_size=top_k)
    check(torch.tensor(data.draw(st.lists(row, min_size=n_tokens, max_size=n_tokens))), n_experts)


def test_no_assignment_at_all():
    tiles = tiles_triton.make_tiles(torch.zeros(0, 2, dtype=torch.int64), 3, TILE_ROWS)
    assert (
        tiles.end_E.tolist() == [0, 0, 0]
        and tiles.used_1.tolist() == [0]
        and len(tiles.expert_M) == len(tiles.slot_R) == 0
        and tiles.row_TK.shape == (0, 2)
    )


def test_experts_laid_out_otherwise():
    expert = choose("dropped", 30, 3, 6).t().contiguous().t()
    check(expert, 6)


@pytest.mark.parametrize("kind", ["spread", "dropped", "all dropped"])
def test_the_layer_runs_on_it(kind, monkeypatch):
    monkeypatch.setattr(experts_triton, "make_tiles", tiles_triton.make_tiles)
    x, w_in, w_out = torch.randn(33, 20), torch.randn(5, 46, 20) * 0.4, torch.randn(5, 20, 23) * 0.4
    given_ = [t.requires_grad_() for t in (x, w_in, w_out, torch.rand(33, 2))]
    exact = [t.detach().double().requires_grad_() for t in given_]
    expert = choose(kind, 33, 2, 5)
    got, wanted = (run(*t[:3], expert, t[3], "swiglu") for run, t in ((experts_triton.expert_ffn, given_), (experts_naive.expert_ffn, exact)))
    slope = torch.randn(got.shape)
    for a, b in zip(torch.autograd.grad(got, given_, slope), torch.autograd.grad(wanted, exact, slope.double()), strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm().clamp_min(1e-6)
