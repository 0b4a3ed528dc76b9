"""SparseMixer against the published code of Phi-3.5-MoE (in transformers), and its estimator against the integral that it estimates."""

from __future__ import annotations

import math

import pytest
import torch

from moe.router_kinds import build_router
from moe.router_sparsemixer import SparseMixerRouter
from spec import routing

phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")


def router(n_experts: int = 6, jitter: float = 0.3) -> SparseMixerRouter:
    torch.manual_seed(0)
    built = build_router(routing.Router(kind="sparsemixer", jitter=jitter), n_experts, n_experts, 2, biased=False, vocab_size=8)
    assert isinstance(built, SparseMixerRouter)
    with torch.no_grad():
        built.weight.copy_(torch.eye(n_experts))  # so that x is the logits
    return built


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_the_published_router_chooses_weighs_and_learns_the_same(training, jitter, shift):
    """In training from the same seed. Theirs draws a number more in the second round, which changes no choice and no gradient."""
    logits_TE = torch.randn(200, 6) + shift
    ours_TE, theirs_TE = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
    built = router(jitter=jitter).train(training)
    torch.manual_seed(7)
    decision = built(ours_TE)
    torch.manual_seed(7)
    gate_TK, expert_TK = phimoe.sparsemixer(theirs_TE, jitter, training)
    assert torch.equal(decision.expert_TK, expert_TK)
    slots = slice(0, 1) if training else slice(0, 2)
    torch.testing.assert_close(decision.gate_TK[:, slots], gate_TK[:, slots], rtol=3e-4, atol=1e-5)  # their third is 0.3333
    slope_TK = torch.randn(200, 2)
    (wanted,) = torch.autograd.grad((gate_TK * slope_TK).sum(), theirs_TE)
    (got,) = torch.autograd.grad((decision.gate_TK * slope_TK).sum(), ours_TE)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_plain_loop_agrees_in_evaluation():
    jitter = 0.2
    logits_TE = torch.randn(60, 5, dtype=torch.float64)
    decision = router(5, jitter).double().eval()(logits_TE)
    for row, experts, gates in zip(logits_TE.tolist(), decision.expert_TK.tolist(), decision.gate_TK.tolist(), strict=True):
        left = dict(enumerate(row))
        for expert, gate in zip(experts, gates, strict=True):
            top = max(left.values())
            assert left[expert] == top
            near = [value for value in left.values() if (top - value) <= 2 * jitter * max(abs(value), top)]
            assert gate == pytest.approx(math.exp(top) / sum(math.exp(value) for value in near))
            del left[expert]
    torch.testing.assert_close(router(5, jitter).double().gates(logits_TE, logits_TE, decision.expert_TK), decision.gate_TK)


def test_the_expected_gradient_is_the_third_order_rule():
    """A drawn expert that is not the best has its gate's derivative taken a third of the way (3/4 of the time) or at the end.

    Their mean is the difference quotient (f(pi) - f(0)) / pi, exactly so where the loss f is a cubic of the gate.
    """
    n = 200_000
    logits_E = torch.tensor([1.0, 0.8, 0.9], dtype=torch.float64)
    built = router(3, jitter=0.45).double()
    decision = built(logits_E.expand(n, -1))
    prob_E = logits_E.softmax(-1)
    first_T, gate_T = decision.expert_TK[:, 0], decision.gate_TK[:, 0]
    share_E = torch.bincount(first_T, minlength=3) / n
    assert ((share_E - prob_E).abs() < 5 * (prob_E * (1 - prob_E) / n).sqrt()).all()
    for expert in (1, 2):
        factor_N = gate_T[first_T == expert] / prob_E[expert]
        whole_N = (factor_N - 1).abs() < 1e-9
        assert ((factor_N[~whole_N] - 1 / 3).abs() < 1e-9).all()
        assert abs(float(whole_N.double().mean()) - 0.25) < 5 * math.sqrt(0.1875 / len(whole_N))
        pi, gate_N = float(prob_E[expert]), gate_T[first_T == expert]
        slope = float((3 * 4.0 * gate_N**2 + 2 * 0.7 * gate_N + 1.1).mean())  # of f(g) = 4 g^3 + 0.7 g^2 + 1.1 g
        difference = 4.0 * pi**2 + 0.7 * pi + 1.1
        assert slope == pytest.approx(difference, rel=0.01)
    torch.testing.assert_close(gate_T[first_T == 0], prob_E[0].expand(int((first_T == 0).sum())))


def test_experts_that_fall_short_share_nothing():
    built = router(4, jitter=0.01).eval()
    decision = built(torch.tensor([[10.0, 9.9, 5.0, 1.0]]))
    near = math.exp(10) + math.exp(9.9)
    assert decision.expert_TK.tolist() == [[0, 1]]
    assert decision.gate_TK[0].tolist() == pytest.approx([math.exp(10) / near, 1.0])
