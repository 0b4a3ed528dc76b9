"""The router in Triton's interpreter against loops over tokens and experts in float64, and against its twin in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from kernels import router_naive, router_triton
from kernels.router_naive import Routed, Rule

pytestmark = pytest.mark.usefixtures("poisoned")

RULES = {
    "softmax": Rule(3, scale=2.5),
    "softmax, renormalised": Rule(3, gate="normalised"),
    "softmax of the kept": Rule(3, gate="softmax", scale=0.5),
    "sigmoid": Rule(3, "sigmoid", "normalised", scale=2.5),
    "sigmoid by logit": Rule(3, "sigmoid", by_logit=True),
    "groups by best": Rule(3, n_groups=4, top_groups=2, group_score="max"),
    "groups by best two": Rule(3, "sigmoid", "normalised", n_groups=4, top_groups=3, group_score="top2_sum"),
}
SHAPES = [(1, 4, 1), (1, 8, 8), (37, 12, 3), (5, 20, 6), (3, 140, 9)]  # T, E, K
DIFFERENTIABLE = ("prob_TE", "gate_TK", "score_TE", "prob_E")


def given_rule(name: str, n_experts: int, top_k: int) -> Rule:
    """A rule for so many experts: groups of at least two."""
    return RULES[name]._replace(top_k=top_k) if n_experts >= 8 else RULES[name]._replace(top_k=top_k, n_groups=1, top_groups=1)


def loop(logits: list[float], bias: list[float], rule: Rule) -> tuple[list[int], list[float], list[float]]:
    """Experts, gates and probabilities of one token, by the words of `Rule`."""
    n = len(logits)
    powers = [math.exp(x - max(logits)) for x in logits]
    scores = [p / sum(powers) for p in powers] if rule.score == "softmax" else [1 / (1 + math.exp(-x)) for x in logits]
    choice = [(x if rule.by_logit else s) + b for x, s, b in zip(logits, scores, bias, strict=True)]
    size = n // rule.n_groups
    groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(rule.n_groups)]
    worth = [group[0] if rule.group_score == "max" else sum(group[:2]) for group in groups]
    best_groups = sorted(range(rule.n_groups), key=lambda g: (-worth[g], g))[: rule.top_groups]
    choice = [c if e // size in best_groups else -math.inf for e, c in enumerate(choice)]
    chosen = sorted(range(n), key=lambda e: (-choice[e], e))[: rule.top_k]
    kept = [math.exp(logits[e] - max(logits)) if rule.gate == "softmax" else scores[e] for e in chosen]
    whole = 1.0 if rule.gate == "score" else sum(kept)
    total = 1.0 if rule.score == "softmax" else sum(scores)
    return chosen, [rule.scale * k / whole for k in kept], [s / total for s in scores]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_as_a_loop_over_experts(name, shape, biased):
    n_tokens, n_experts, top_k = shape
    rule = given_rule(name, n_experts, top_k)
    logits, bias = torch.randn(n_tokens, n_experts), torch.randn(n_experts) * 0.3 if biased else None
    got = router_triton.route(logits, bias, rule)
    for t in range(n_tokens):
        chosen, gates, probs = loop(logits[t].tolist(), bias.tolist() if bias is not None else [0.0] * n_experts, rule)
        assert got.expert_TK[t].tolist() == chosen
        assert got.gate_TK[t].tolist() == pytest.approx(gates, rel=1e-5)
        assert got.prob_TE[t].tolist() == pytest.approx(probs, rel=1e-5)
    assert got.count_E.tolist() == [int((got.expert_TK == e).sum()) for e in range(n_experts)]
    torch.testing.assert_close(got.prob_E, got.prob_TE.double().mean(0).float())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_outputs_and_gradients_equal_the_twin_in_float64(name, biased):
    logits = torch.randn(19, 12, requires_grad=True)
    bias = torch.randn(12) * 0.3 if biased else None
    exact = logits.detach().double().requires_grad_()
    got, wanted = router_triton.route(logits, bias, RULES[name]), router_naive.route(exact, bias, RULES[name])
    single = router_naive.route(logits.detach(), bias, RULES[name])
    for field, a, b, c in zip(Routed._fields, got, wanted, single, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6, msg=lambda text, field=field: f"{field}: {text}")
        assert (a.dtype, a.shape) == (c.dtype, c.shape), field
    for fields in (*((field,) for field in DIFFERENTIABLE), DIFFERENTIABLE):
        slopes = [torch.randn(getattr(wanted, field).shape, dtype=torch.float64) for field in fields]
        mine, theirs = (
            torch.autograd.grad([getattr(routed, f) for f in fields], x, [s.to(x.dtype) for s in slopes], retain_graph=True)[0]
            for routed, x in ((got, logits), (wanted, exact))
        )
        assert (mine.double() - theirs).norm() <= 1e-5 * theirs.norm().clamp_min(1e-2), fields


@pytest.mark.parametrize("name", RULES)
def test_the_twins_gradients_are_those_of_differences(name):
    logits = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: [getattr(router_naive.route(x, None, RULES[name]), field) for field in DIFFERENTIABLE], logits)


def test_a_gradient_of_a_mean_over_tokens_is_read_where_it_lies():
    """Its stride over tokens is 0."""
    logits = torch.randn(9, 6, requires_grad=True)
    weight = torch.randn(6)
    got, wanted = (
        torch.autograd.grad((route(logits, None, Rule(2)).prob_TE.mean(0) * weight).sum(), logits)[0]
        for route in (router_triton.route, router_naive.route)
    )
    torch.testing.assert_close(got, wanted)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 9), st.integers(1, 20))
def test_equal_choices_go_to_the_lower_expert(data, n_tokens, n_experts):
    top_k = data.draw(st.integers(1, n_experts))
    values = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.5]), min_size=n_experts, max_size=n_experts)
    rows = data.draw(st.lists(values, min_size=n_tokens, max_size=n_tokens))
    for rule in (Rule(top_k), Rule(top_k, "sigmoid", by_logit=True)):
        got = router_triton.route(torch.tensor(rows), None, rule).expert_TK.tolist()
        assert got == [sorted(range(n_experts), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]


def test_neighbouring_floats_are_told_apart():
    """A key that gave its last bits to the column would not."""
    low = torch.tensor(0.3)
    high = torch.nextafter(low, torch.tensor(1.0))
    rows = torch.stack([torch.stack([low] * 7 + [high]), torch.stack([-high] * 7 + [-low])])
    assert router_triton.route(rows, None, Rule(2, "sigmoid", by_logit=True)).expert_TK.tolist() == [[7, 0], [7, 0]]


def test_infinities_and_nan_are_ordered_as_torch_orders_them():
    row = torch.tensor([[0.0, math.nan, -math.inf, math.inf, -math.nan, 1.0]])
    assert router_triton.route(row, None, Rule(6, "sigmoid", by_logit=True)).expert_TK.tolist() == [[1, 4, 3, 5, 0, 2]]
    assert row.topk(4).indices[0, 2:].tolist() == [3, 5]


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_more_experts_than_the_open_groups_have_are_taken_in_order(group_score):
    """They are all at -inf: the lowest come first, none twice, and their gates are their scores."""
    rule = Rule(5, "sigmoid", n_groups=3, top_groups=1, group_score=group_score)
    logits = torch.tensor([[0.1, 0.2, 3.0, 4.0, 0.3, 0.4]])
    got = router_triton.route(logits, None, rule)
    assert got.expert_TK.tolist() == [[3, 2, 0, 1, 4]]
    torch.testing.assert_close(got.gate_TK, logits.sigmoid()[:, [3, 2, 0, 1, 4]])
    assert got.choice_TE.isneginf().tolist() == [[True, True, False, False, True, True]]


@pytest.mark.parametrize("n_groups", [3, 5])
def test_groups_that_are_no_powers_of_two(n_groups):
    """Groups and their members are padded in the tile: padding may neither be chosen nor count."""
    rule = Rule(7, "sigmoid", "normalised", n_groups=n_groups, top_groups=2, group_score="top2_sum")
    logits, bias = torch.randn(11, 15 * 3), -2 - torch.rand(45)  # choices below the 0 of padding
    got, wanted = router_triton.route(logits, bias, rule), router_naive.route(logits, bias, rule)
    assert torch.equal(got.expert_TK, wanted.expert_TK)
    torch.testing.assert_close(got.choice_TE, wanted.choice_TE)


@pytest.mark.parametrize("rule", [Rule(4), Rule(4, "sigmoid", "normalised", n_groups=4, top_groups=2), Rule(4, gate="softmax")])
def test_bfloat16_scores_are_rounded_before_they_are_compared(rule):
    logits = torch.randn(23, 64).bfloat16().requires_grad_()
    got, twin = router_triton.route(logits, None, rule), router_naive.route(logits, None, rule)
    assert torch.equal(got.expert_TK, got.choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :4])
    assert all(a.dtype == b.dtype for a, b in zip(got, twin, strict=True))
    torch.testing.assert_close(got.prob_TE, twin.prob_TE, rtol=2e-2, atol=1e-4)  # the interpreter truncates where it casts
    exact = logits.detach().double().requires_grad_()
    weight = torch.randn(64)
    slopes = [
        torch.autograd.grad((routed.prob_TE * weight).sum() + routed.prob_E @ weight.to(routed.prob_E.dtype), x)[0]
        for routed, x in ((got, logits), (router_naive.route(exact, None, rule), exact))
    ]
    assert (slopes[0].double() - slopes[1]).norm() < 2e-2 * slopes[1].norm()


def test_every_program_takes_several_tiles_where_there_are_many_tokens(monkeypatch):
    monkeypatch.setattr(router_triton, "MOST_PROGRAMS", 2)
    logits = torch.randn(333, 6)
    got, wanted = router_triton.route(logits, None, Rule(2)), router_naive.route(logits, None, Rule(2))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_largest_that_is_taken():
    logits, rule = torch.randn(3, 1024, requires_grad=True), Rule(32, gate="normalised")
    got, wanted = router_triton.route(logits, None, rule), router_naive.route(logits, None, rule)
    assert torch.equal(got.expert_TK, wanted.expert_TK) and int(got.count_E.sum()) == 96
    weight = torch.randn(3, 32)
    slopes = [torch.autograd.grad((routed.gate_TK * weight).sum(), logits)[0] for routed in (got, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-8)


def test_no_token_at_all():
    logits = torch.zeros(0, 4, requires_grad=True)
    got = router_triton.route(logits, None, Rule(2))
    assert got.expert_TK.shape == got.gate_TK.shape == (0, 2) and got.count_E.tolist() == [0] * 4
    assert torch.autograd.grad(got.gate_TK.sum(), logits)[0].shape == (0, 4)


def test_what_lies_beside_the_logits_is_not_read():
    wide = torch.full((8, 9), math.nan)
    wide[:5, :6] = torch.randn(5, 6)
    got, wanted = router_triton.route(wide[:5, :6], None, Rule(2)), router_naive.route(wide[:5, :6], None, Rule(2))
    assert torch.equal(got.expert_TK, wanted.expert_TK)
    torch.testing.assert_close(got.prob_E, wanted.prob_E)
    turned = wide[:5, :6].t().contiguous().t()
    assert torch.equal(router_triton.route(turned, None, Rule(2)).expert_TK, wanted.expert_TK)


def test_scores_that_are_all_zero_give_gates_of_zero_and_a_finite_gradient():
    logits = torch.full((2, 4), -200.0, requires_grad=True)
    got = router_triton.route(logits, None, Rule(2, "sigmoid", "normalised"))
    assert not got.gate_TK.any() and not got.prob_TE.any()
    assert torch.autograd.grad(got.gate_TK.sum() + got.prob_E.sum(), logits)[0].isfinite().all()


def test_only_the_logits_are_kept_of_what_has_a_row_for_each_token_and_expert():
    logits = torch.randn(40, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        router_triton.route(logits, None, Rule(2))
    assert [tensor.shape for tensor in kept] == [(40, 16), (40, 2)]
    assert kept[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "groups by best two"])
def test_the_operations_are_registered_as_torch_asks(name):
    rule, logits = RULES[name], torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(router_triton._route_op, (logits, torch.rand(8), *rule))
    expert, dgate, dprob = torch.arange(3).expand(5, 3).contiguous(), torch.randn(5, 3), torch.randn(5, 8)
    torch.library.opcheck(
        router_triton._route_backward_op, (logits.detach(), expert, dgate, dprob, None, torch.randn(8), rule.score, rule.gate, rule.scale)
    )


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(ValueError, match="top_k 5 of 4 experts"):
        router_triton.route(torch.zeros(2, 4), None, Rule(5))
