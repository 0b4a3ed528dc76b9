"""Balanced assignment against scipy's exact solver, on random, tied and lopsided scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moe.assignment import assign, fair_shares


def best_total(score_TE: Tensor, place_E: Tensor) -> float:
    """The highest total score, by scipy, with a column for each place."""
    expert_R = torch.arange(len(place_E)).repeat_interleave(place_E)
    rows, columns = linear_sum_assignment(score_TE.double()[:, expert_R].numpy(), maximize=True)
    return float(score_TE.double()[rows, expert_R[columns]].sum())


def total(score_TE: Tensor, expert_T: Tensor) -> float:
    return float(score_TE.double().gather(1, expert_T[:, None]).sum())


def tolerance(score_TE: Tensor, precision: float) -> float:
    centred = score_TE.double() - score_TE.double().mean(0)
    return len(score_TE) * precision * float((centred.amax(1) - centred.amin(1)).max()) + 1e-9 * len(score_TE) * float(score_TE.abs().max())


KINDS = ["normal", "few directions", "one favourite", "all alike", "tied", "huge"]


def scores(kind: str, n_tokens: int, n_experts: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(n_tokens, n_experts, generator=draw)
    return {
        "normal": normal,
        "few directions": torch.randn(n_tokens, 2, generator=draw) @ torch.randn(2, n_experts, generator=draw),
        "one favourite": 0.01 * normal + torch.arange(n_experts),
        "all alike": normal[:1].expand(n_tokens, -1).contiguous(),
        "tied": normal.round(),
        "huge": 1e6 * normal,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(n_tokens=st.integers(1, 60), n_experts=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_equal_loads_at_nearly_the_highest_total(kind, n_tokens, n_experts, seed):
    score_TE = scores(kind, n_tokens, n_experts, seed)
    place_E = fair_shares(score_TE)
    assert int(place_E.sum()) == n_tokens
    assert set(place_E.tolist()) <= {n_tokens // n_experts, math.ceil(n_tokens / n_experts)}
    for precision in (1e-2, 1e-6):
        expert_T = assign(score_TE, place_E, precision)
        assert torch.equal(torch.bincount(expert_T, minlength=n_experts), place_E)
        assert total(score_TE, expert_T) >= best_total(score_TE, place_E) - tolerance(score_TE, precision)


def test_a_large_batch_is_within_the_tolerance():
    score_TE = torch.randn(1200, 16, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 3, 16)
    place_E = fair_shares(score_TE)
    assert torch.equal(place_E, torch.full((16,), 75))
    expert_T = assign(score_TE, place_E)
    assert best_total(score_TE, place_E) - tolerance(score_TE, 1e-2) <= total(score_TE, expert_T) <= best_total(score_TE, place_E) + 1e-6


def test_unequal_places_are_respected():
    score_TE = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    place_E = torch.tensor([0, 21, 9, 0])
    expert_T = assign(score_TE, place_E, 1e-7)
    assert torch.equal(torch.bincount(expert_T, minlength=4), place_E)
    assert total(score_TE, expert_T) == pytest.approx(best_total(score_TE, place_E))
    only = assign(score_TE, torch.tensor([0, 0, 30, 0]))
    assert (only == 2).all()


def test_the_remainder_goes_where_most_tokens_want_to_be():
    score_TE = torch.zeros(8, 3)
    score_TE[:6, 1] = 1.0
    score_TE[6:, 2] = 1.0
    assert fair_shares(score_TE).tolist() == [2, 3, 3]
    assert fair_shares(torch.tensor([[0.0, 5.0, 1.0]])).tolist() == [0, 1, 0]


def test_scores_that_are_not_finite_end_too():
    score_TE = torch.randn(12, 3)
    score_TE[0] = torch.nan
    score_TE[1, 2] = torch.inf
    expert_T = assign(score_TE, torch.tensor([4, 4, 4]))
    assert torch.bincount(expert_T, minlength=3).tolist() == [4, 4, 4]
    assert torch.bincount(assign(torch.full((12, 3), torch.nan), torch.tensor([4, 4, 4])), minlength=3).tolist() == [4, 4, 4]


def test_places_must_be_as_many_as_tokens():
    with pytest.raises(ValueError, match="5 places for 6 tokens"):
        assign(torch.randn(6, 2), torch.tensor([2, 3]))
