"""Routers against the formulas written as loops, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.router_naive import limit_groups
from moe.router import ScoringRouter
from moe.router_kinds import build_router
from spec import routing


def router(kind: str, n_experts: int = 8, top_k: int = 3, *, biased: bool = False, seed: int = 0, **options: object) -> ScoringRouter:
    built = build_router(routing.Router(kind=kind, **options), 16, n_experts, top_k, biased=biased, vocab_size=32)
    assert isinstance(built, ScoringRouter)
    torch.manual_seed(seed)
    torch.nn.init.normal_(built.weight)
    return built


def by_hand(kind: str, logits: list[float], bias: list[float], k: int, scale: float, *, renormalise: bool) -> tuple[list[int], list[float]]:
    """Experts and gates of one token, in plain Python."""
    if kind == "sigmoid_topk":
        score = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        score = [math.exp(x) / total for x in logits]
    chosen = sorted(range(len(logits)), key=lambda i: -(score[i] + bias[i]))[:k]
    gates = [score[i] for i in chosen]
    if kind in ("topk_softmax", "sigmoid_topk") or renormalise:
        gates = [g / sum(gates) for g in gates]
    return chosen, [g * scale for g in gates]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("kind", "k", "options"),
    [
        ("softmax_topk", 3, {}),
        ("softmax_topk", 3, {"renormalise": True}),
        ("softmax_topk", 2, {"scale": 16.0}),
        ("topk_softmax", 3, {}),
        ("sigmoid_topk", 4, {"scale": 2.5}),
        ("switch", 1, {}),
    ],
)
def test_choices_and_gates_follow_the_formula(kind, k, options, biased):
    built = router(kind, top_k=k, biased=biased, **options)
    if built.bias_E is not None:
        built.bias_E.normal_(0, 0.3)
    x = torch.randn(20, 16)
    decision = built(x)
    bias = [0.0] * 8 if built.bias_E is None else built.bias_E.tolist()
    for token in range(20):
        chosen, gates = by_hand(
            kind, (x[token] @ built.weight.T).tolist(), bias, k, options.get("scale", 1.0), renormalise=bool(options.get("renormalise"))
        )
        assert decision.expert_TK[token].tolist() == chosen
        torch.testing.assert_close(decision.gate_TK[token], torch.tensor(gates), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(decision.prob_TE.sum(-1), torch.ones(20))


def test_softmax_over_all_then_renormalised_is_softmax_over_the_kept():
    before, after = router("softmax_topk", renormalise=True), router("topk_softmax")
    x = torch.randn(50, 16, requires_grad=True)
    first, second = before(x), after(x)
    assert torch.equal(first.expert_TK, second.expert_TK)
    torch.testing.assert_close(first.gate_TK, second.gate_TK)
    slope = torch.randn(50, 3)
    (a,), (b,) = (torch.autograd.grad((d.gate_TK * slope).sum(), x) for d in (first, second))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_renaming_the_experts_renames_the_choices():
    plain, renamed = router("sigmoid_topk", biased=True), router("sigmoid_topk", biased=True)
    assert plain.bias_E is not None and renamed.bias_E is not None
    plain.bias_E.normal_(0, 0.2)
    new_name = torch.randperm(8)
    with torch.no_grad():
        renamed.weight[new_name] = plain.weight
        renamed.bias_E[new_name] = plain.bias_E
    x = torch.randn(30, 16)
    assert torch.equal(new_name[plain(x).expert_TK], renamed(x).expert_TK)
    torch.testing.assert_close(plain(x).gate_TK, renamed(x).gate_TK)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@given(data=st.data(), n_groups=st.integers(2, 4), size=st.integers(2, 4))
@settings(max_examples=50, deadline=None)
def test_only_the_best_groups_can_be_chosen_from(group_score, data, n_groups, size):
    top_groups = data.draw(st.integers(1, n_groups))
    values = data.draw(st.permutations(range(n_groups * size)))
    limited = limit_groups(torch.tensor([values], dtype=torch.float32), n_groups, top_groups, group_score)[0]
    groups = [values[g * size : (g + 1) * size] for g in range(n_groups)]
    score = [max(group) if group_score == "max" else sum(sorted(group)[-2:]) for group in groups]
    for g, group in enumerate(groups):
        beaten_by = sum(other > score[g] for other in score)
        if beaten_by >= top_groups:
            assert limited[g * size : (g + 1) * size].isinf().all()
        elif sum(other >= score[g] for other in score) <= top_groups:  # no tie at the border
            assert limited[g * size : (g + 1) * size].tolist() == group


def test_group_limited_choices_lie_in_few_groups():
    built = router("sigmoid_topk", n_experts=16, top_k=4, n_groups=4, top_groups=2)
    expert_TK = built(torch.randn(200, 16)).expert_TK
    assert all(len(set((row // 4).tolist())) <= 2 for row in expert_TK)
    assert all(len(set(row.tolist())) == 4 for row in expert_TK)


def test_jitter_moves_the_logits_in_training_only():
    built = router("switch", top_k=1, jitter=0.1)
    x = torch.randn(50, 16)
    exact = x @ built.weight.T
    assert not torch.allclose(built(x).logits_TE, exact)
    bound = 0.1 * (x.abs() @ built.weight.abs().T) + 1e-5
    assert ((built(x).logits_TE - exact).abs() <= bound).all()
    torch.testing.assert_close(built.eval()(x).logits_TE, exact)


def test_the_router_stays_in_float32_under_autocast_unless_told_otherwise():
    x = torch.randn(10, 16)
    with torch.autocast("cpu", torch.bfloat16):
        exact, rough = router("topk_softmax")(x), router("topk_softmax", dtype="bfloat16")(x)
    assert exact.logits_TE.dtype == torch.float32 and rough.logits_TE.dtype == torch.bfloat16
    torch.testing.assert_close(exact.logits_TE, router("topk_softmax")(x).logits_TE, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_gates_and_probabilities_have_the_right_gradient(kind):
    built = router(kind).double()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        decision = built(x)
        return decision.gate_TK, decision.prob_TE

    assert built(x).gate_TK.dtype == torch.float64
    assert torch.autograd.gradcheck(outputs, (x,))
