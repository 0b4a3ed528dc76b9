"""Balancing losses against loops over their formulas in float64, and the direction in which they push."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from kernels import router_naive
from moe import balance
from moe.balance_global import GlobalBalance
from moe.router import rule
from moe.routing import Decision, Noise
from spec import balance as terms
from spec.moe import Moe
from spec.routing import Router


def random_decision(n_tokens: int = 24, n_experts: int = 6, top_k: int = 2, *, unplaced: float = 0.0) -> Decision:
    """Softmax over all, with the share `unplaced` of the slots empty."""
    logits = torch.randn(n_tokens, n_experts, dtype=torch.float64, requires_grad=True)
    prob = logits.softmax(-1)
    gate, expert = prob.topk(top_k)
    empty = torch.rand(expert.shape) < unplaced
    return Decision(logits, prob, expert.masked_fill(empty, n_experts), gate.masked_fill(empty, 0.0))


def value(term: terms.BalanceTerm, decision: Decision, batch: int = 1, router: Router | None = None) -> Tensor:
    n_experts, top_k = decision.prob_TE.shape[1], decision.expert_TK.shape[1]
    moe = Moe.model_construct(n_experts=n_experts, top_k=top_k, router=router or Router())
    return balance.loss(term, decision, balance.counts(decision.expert_TK, n_experts), batch, moe)


def shares(decision: Decision, tokens: range, slots: int | None = None) -> list[float]:
    """f_i over `tokens`, by counting; a share of the slots that hold an expert."""
    chosen = [int(e) for t in tokens for e in decision.expert_TK[t, :slots] if int(e) < decision.prob_TE.shape[1]]
    return [chosen.count(i) / max(1, len(chosen)) for i in range(decision.prob_TE.shape[1])]


def mean_prob(decision: Decision, tokens: range) -> list[float]:
    return [sum(decision.prob_TE[t, i].item() for t in tokens) / len(tokens) for i in range(decision.prob_TE.shape[1])]


@pytest.mark.parametrize("unplaced", [0.0, 0.4])
@pytest.mark.parametrize(("choices", "slots"), [("all", None), ("first", 1)])
def test_switch_loss_is_the_formula(choices, slots, unplaced):
    torch.manual_seed(0)
    decision = random_decision(unplaced=unplaced)
    wanted = 6 * np.dot(shares(decision, range(24), slots), mean_prob(decision, range(24)))
    assert math.isclose(value(terms.SwitchAux(choices=choices), decision).item(), wanted, rel_tol=1e-9)


def test_switch_loss_is_one_when_balanced_and_e_when_collapsed():
    even = torch.full((4,), 0.25)
    assert float(balance.switch_aux(even, torch.tensor([4, 4, 4, 4]))) == pytest.approx(1.0)
    one = torch.tensor([1.0, 0, 0, 0])
    assert float(balance.switch_aux(one, torch.tensor([8, 0, 0, 0]))) == pytest.approx(4.0)


def test_switch_loss_lowers_the_probability_of_the_busiest_expert():
    logits = torch.zeros(16, 4, requires_grad=True)
    balance.switch_aux(logits.softmax(-1).mean(0), torch.tensor([13, 1, 1, 1])).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("unplaced", [0.0, 0.4])
def test_sequence_loss_is_the_mean_over_sequences_of_the_formula(unplaced):
    torch.manual_seed(1)
    decision = random_decision(unplaced=unplaced)
    rows = [range(b * 8, b * 8 + 8) for b in range(3)]
    wanted = sum(6 * np.dot(shares(decision, row), mean_prob(decision, row)) for row in rows) / 3
    assert math.isclose(value(terms.SequenceAux(), decision, 3).item(), wanted, rel_tol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_sequence_loss_counts_the_highest_scores_whatever_bias_and_groups_made_of_them(groups):
    torch.manual_seed(1)
    score = torch.rand(24, 6, dtype=torch.float64)
    moe = Moe(
        n_experts=6,
        top_k=2,
        router=Router(kind="sigmoid_topk", n_groups=groups),
        balance=[terms.LossFreeBias(), terms.SequenceAux()] if groups == 1 else [terms.SequenceAux()],
    )
    routed = router_naive.route(score.logit(), torch.linspace(-1, 1, 6) if groups == 1 else None, rule(moe.router, 2, biased=groups == 1))
    decision = Decision(score.logit(), **routed._asdict())
    highest = [sorted(range(6), key=lambda i: -float(score[t, i]))[:2] for t in range(24)]
    assert highest != decision.expert_TK.tolist()
    wanted = 0.0
    for b in range(3):
        for i in range(6):
            f = 6 / (2 * 8) * sum(i in highest[t] for t in range(8 * b, 8 * b + 8))
            wanted += f * sum(float(score[t, i] / score[t].sum()) for t in range(8 * b, 8 * b + 8)) / 8 / 3
    found = balance.loss(terms.SequenceAux(), decision, balance.counts(decision.expert_TK, 6), 3, moe)
    assert math.isclose(found.item(), wanted, rel_tol=1e-9)


def test_sequence_loss_of_one_sequence_is_the_switch_loss():
    torch.manual_seed(2)
    decision = random_decision()
    torch.testing.assert_close(value(terms.SequenceAux(), decision), value(terms.SwitchAux(), decision))


@pytest.mark.parametrize("n_devices", [1, 2, 3, 6])
def test_device_loss_is_the_formula(n_devices):
    torch.manual_seed(3)
    decision = random_decision(unplaced=0.2)
    f, p = [6 * share for share in shares(decision, range(24))], mean_prob(decision, range(24))
    held = 6 // n_devices
    parts = [range(v * held, (v + 1) * held) for v in range(n_devices)]
    wanted = sum(sum(f[i] for i in part) / held * sum(p[i] for i in part) for part in parts)
    assert math.isclose(value(terms.DeviceAux(n_devices=n_devices), decision).item(), wanted, rel_tol=1e-9)


@pytest.mark.parametrize("n_devices", [1, 2, 3, 6])
def test_communication_loss_counts_each_token_once_on_a_device(n_devices):
    torch.manual_seed(4)
    decision = random_decision(top_k=3, unplaced=0.2)
    p, held = mean_prob(decision, range(24)), 6 // n_devices
    wanted = 0.0
    for v in range(n_devices):
        part = range(v * held, (v + 1) * held)
        sent = sum(any(int(e) in part for e in decision.expert_TK[t]) for t in range(24))
        wanted += n_devices / (min(3, n_devices) * 24) * sent * sum(p[i] for i in part)
    assert math.isclose(value(terms.CommunicationAux(n_devices=n_devices), decision).item(), wanted, rel_tol=1e-9)


def test_the_devices_that_a_token_may_go_to_are_its_groups():
    limited = Router(kind="softmax_topk", n_groups=4, top_groups=3)
    assert balance.devices_per_token(limited, 6, 4) == 3
    assert balance.devices_per_token(limited, 2, 4) == 2  # two experts reach two devices at most
    assert balance.devices_per_token(limited, 16, 8) == 6  # a group lies on two devices
    assert balance.devices_per_token(limited, 16, 2) == 2  # a device holds two groups
    assert balance.devices_per_token(limited, 16, 6) == 6  # its groups are no devices
    assert balance.devices_per_token(Router(), 6, 4) == 4


@pytest.mark.parametrize("unplaced", [0.0, 0.4])
def test_importance_loss_is_the_squared_coefficient_of_variation_of_the_gates(unplaced):
    torch.manual_seed(5)
    decision = random_decision(unplaced=unplaced)
    importance = [0.0] * 6
    for expert, gate in zip(decision.expert_TK.flatten().tolist(), decision.gate_TK.flatten().tolist(), strict=True):
        if expert < 6:
            importance[expert] += gate
    wanted = np.var(importance) / np.mean(importance) ** 2
    assert math.isclose(value(terms.ImportanceCv2(), decision).item(), wanted, rel_tol=1e-9)


def noisy_decision(n_tokens: int, n_experts: int, top_k: int, clean: Tensor, std: Tensor, noise: Tensor) -> Decision:
    noisy = clean + noise * std
    gate, expert = noisy.softmax(-1).topk(top_k)
    return Decision(clean, clean.softmax(-1), expert, gate, choice_TE=noisy.detach().softmax(-1), noise=Noise(clean, std, noisy))


@pytest.mark.parametrize(("n_experts", "top_k"), [(6, 2), (4, 1), (5, 4), (3, 3)])
def test_load_loss_is_the_formula_with_the_normal_distribution_of_scipy(n_experts, top_k):
    torch.manual_seed(6)
    clean, noise = torch.randn(9, n_experts, dtype=torch.float64), torch.randn(9, n_experts, dtype=torch.float64)
    std = torch.rand(9, n_experts, dtype=torch.float64) + 0.1
    decision = noisy_decision(9, n_experts, top_k, clean, std, noise)
    noisy = (clean + noise * std).numpy()
    load = np.zeros(n_experts)
    for t in range(9):
        for i in range(n_experts):
            others = sorted(np.delete(noisy[t], i), reverse=True)
            load[i] += norm.cdf((clean[t, i].item() - others[top_k - 1]) / std[t, i].item()) if top_k <= len(others) else 1.0
    wanted = np.var(load) / np.mean(load) ** 2
    assert value(terms.LoadCv2(), decision).item() == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def test_load_loss_gives_experts_outside_the_groups_no_chance():
    torch.manual_seed(7)
    clean = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    decision = noisy_decision(5, 6, 2, clean, torch.full((5, 6), 0.5, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64))
    closed = torch.tensor([True, True, False, False, True, True]).expand(5, 6)
    assert decision.choice_TE is not None
    closing = decision._replace(choice_TE=decision.choice_TE.masked_fill(closed, -math.inf))
    loss = value(terms.LoadCv2(), closing)
    assert loss.item() == pytest.approx(np.var([0, 0, 5, 5, 0, 0]) / (10 / 6) ** 2)  # two remain, both are always taken
    loss.backward()
    assert clean.grad is not None and torch.isfinite(clean.grad).all()


def test_noise_that_has_vanished_leaves_the_load_loss_a_gradient():
    """Softplus gives 0 in float32 from -104 on; then the experts are what the clean logits say."""
    clean = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]], requires_grad=True)
    std = torch.zeros(2, 3, requires_grad=True)
    loss = balance.load_cv2(Noise(clean, std, clean + std), None, 1, torch.tensor([1, 1, 0]))
    assert loss.item() == pytest.approx(np.var([1, 1, 0]) / (2 / 3) ** 2)
    loss.backward()
    assert clean.grad is not None and clean.grad.isfinite().all() and std.grad is not None and std.grad.isfinite().all()


def test_load_loss_without_noise_is_that_of_the_counts():
    decision = random_decision()
    counts = balance.counts(decision.expert_TK, 6).double().numpy()
    assert value(terms.LoadCv2(), decision).item() == pytest.approx(np.var(counts) / np.mean(counts) ** 2)


def test_z_loss_is_the_formula():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    wanted = (math.log(2) ** 2 + math.log(math.exp(3) + math.exp(-1)) ** 2) / 2
    assert float(balance.z_loss(logits)) == pytest.approx(wanted)


TERMS = (
    terms.SwitchAux(),
    terms.SwitchAux(choices="first"),
    terms.DeviceAux(n_devices=2),
    terms.CommunicationAux(n_devices=2),
    terms.SequenceAux(),
    terms.ZLoss(),
)


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_losses_have_the_right_gradient(term):
    torch.manual_seed(8)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expert = torch.randint(0, 5, (6, 2))
    assert torch.autograd.gradcheck(lambda logits: value(term, Decision(logits, logits.softmax(-1), expert, logits[:, :2]), 2), (logits,))


def test_the_losses_of_gates_and_loads_have_the_right_gradient():
    torch.manual_seed(9)
    expert, gate = torch.tensor([[0, 1], [2, 4], [0, 3], [1, 2]]), torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda gate: balance.importance_cv2(expert, gate, 4), (gate,))
    clean, std = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.rand(5, 4, dtype=torch.float64).add_(0.2).requires_grad_()
    noise = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda clean, std: value(terms.LoadCv2(), noisy_decision(5, 4, 2, clean, std, noise)), (clean, std))


def test_even_loads_have_no_variation_and_a_gradient_step_evens_them_out():
    torch.manual_seed(10)
    clean = (torch.randn(64, 4, dtype=torch.float64) + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    std, noise = torch.ones(64, 4, dtype=torch.float64), torch.randn(64, 4, dtype=torch.float64)
    before = value(terms.LoadCv2(), noisy_decision(64, 4, 2, clean, std, noise))
    (gradient,) = torch.autograd.grad(before, clean)
    after = value(terms.LoadCv2(), noisy_decision(64, 4, 2, clean.detach() - 5 * gradient, std, noise))
    assert gradient[:, 0].sum() > 0 and after < before
    assert float(balance.cv2(torch.tensor([3.0, 3.0, 3.0]))) == 0.0 and float(balance.cv2(torch.zeros(3))) == 0.0


@given(st.integers(1, 6), st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_every_loss_is_finite_with_ties_empty_experts_and_one_token(n_tokens, n_experts, data):
    top_k = data.draw(st.integers(1, n_experts))
    logits = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=n_tokens * n_experts, max_size=n_tokens * n_experts))).double()
    logits = logits.view(n_tokens, n_experts).requires_grad_()
    expert = torch.tensor(data.draw(st.lists(st.integers(0, n_experts), min_size=n_tokens * top_k, max_size=n_tokens * top_k))).view(n_tokens, top_k)
    noise = Noise(logits, torch.full_like(logits, 0.5), logits)
    gate = logits.softmax(-1)[:, :top_k].masked_fill(expert == n_experts, 0.0)
    decision = Decision(logits, logits.softmax(-1), expert, gate, noise=noise)
    every = [
        *TERMS[:2],
        terms.DeviceAux(n_devices=1),
        terms.CommunicationAux(n_devices=n_experts),
        *TERMS[4:],
        terms.ImportanceCv2(),
        terms.LoadCv2(),
    ]
    for term in every:
        loss = value(term, decision)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True) if loss.requires_grad else (None,)
        assert torch.isfinite(loss) and loss >= 0, term
        assert gradient is None or torch.isfinite(gradient).all(), term


def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones_by_the_rate():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    kept = bias
    balance.update_bias(bias, torch.tensor([10, 0, 5, 5]), 1e-3)
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.501, 0.5, 0.5]))
    assert kept is bias  # in place: a checkpointed buffer must not be replaced


def test_terms_with_a_loss_keep_the_specs_order():
    listed = [terms.ZLoss(), terms.LossFreeBias(update_rate=0.01), terms.SwitchAux()]
    assert [term.kind for term in balance.loss_terms(listed)] == ["z_loss", "switch_aux"]
    assert balance.bias_update_rate(listed) == 0.01 and balance.bias_update_rate([]) is None
    with pytest.raises(ValueError, match="loss_free_bias"):
        value(terms.LossFreeBias(), random_decision())
    assert GlobalBalance([terms.ZLoss(), terms.GlobalAux(coefficient=0.5)]).column == 1
