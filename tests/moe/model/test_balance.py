"""Balancing losses against loops over their formulas, and the direction in which they push."""

from __future__ import annotations

import math

import pytest
import torch

from moe import balance
from moe.routing import Decision
from spec import balance as balance_spec


def random_decision(n_tokens: int = 24, n_experts: int = 6, top_k: int = 2) -> Decision:
    logits = torch.randn(n_tokens, n_experts, dtype=torch.float64, requires_grad=True)
    prob = logits.softmax(-1)
    gate, expert = prob.topk(top_k)
    return Decision(logits, prob, expert, gate)


def test_switch_loss_is_the_formula():
    torch.manual_seed(0)
    decision = random_decision()
    count = torch.bincount(decision.expert_TK.flatten(), minlength=6)
    wanted = 0.0
    for i in range(6):
        n_i = sum(int(e) == i for e in decision.expert_TK.flatten())
        wanted += n_i / (2 * 24) * sum(decision.prob_TE[:, i].tolist()) / 24
    assert math.isclose(balance.switch_aux(decision.prob_TE, count).item(), 6 * wanted, rel_tol=1e-9)


def test_switch_loss_is_one_when_balanced_and_e_when_collapsed():
    even = torch.full((8, 4), 0.25)
    assert float(balance.switch_aux(even, torch.tensor([4, 4, 4, 4]))) == pytest.approx(1.0)
    one = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    assert float(balance.switch_aux(one, torch.tensor([8, 0, 0, 0]))) == pytest.approx(4.0)


def test_switch_loss_lowers_the_probability_of_the_busiest_expert():
    logits = torch.zeros(16, 4, requires_grad=True)
    balance.switch_aux(logits.softmax(-1), torch.tensor([13, 1, 1, 1])).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_sequence_loss_is_the_mean_over_sequences_of_the_formula():
    torch.manual_seed(1)
    decision = random_decision()
    wanted = 0.0
    for b in range(3):
        tokens = range(b * 8, b * 8 + 8)
        for i in range(6):
            f = 6 / (2 * 8) * sum(int(decision.expert_TK[t, k]) == i for t in tokens for k in range(2))
            wanted += f * sum(decision.prob_TE[t, i].item() for t in tokens) / 8 / 3
    assert math.isclose(balance.sequence_aux(decision.prob_TE, decision.expert_TK, 3).item(), wanted, rel_tol=1e-9)


def test_sequence_loss_of_one_sequence_is_the_switch_loss():
    torch.manual_seed(2)
    decision = random_decision()
    count = torch.bincount(decision.expert_TK.flatten(), minlength=6)
    torch.testing.assert_close(balance.sequence_aux(decision.prob_TE, decision.expert_TK, 1), balance.switch_aux(decision.prob_TE, count))


def test_z_loss_is_the_formula():
    logits = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    wanted = (math.log(2) ** 2 + math.log(math.exp(3) + math.exp(-1)) ** 2) / 2
    assert float(balance.z_loss(logits)) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["switch_aux", "sequence_aux", "z_loss"])
def test_losses_have_the_right_gradient(kind):
    torch.manual_seed(3)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expert = torch.randint(0, 4, (6, 2))
    count = torch.bincount(expert.flatten(), minlength=4)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return balance.loss(kind, Decision(logits, logits.softmax(-1), expert, logits), count, batch=2)

    assert torch.autograd.gradcheck(loss, (logits,))


def test_the_bias_rises_for_idle_experts_and_falls_for_busy_ones_by_the_rate():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    kept = bias
    balance.update_bias(bias, torch.tensor([10, 0, 5, 5]), 1e-3)
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.501, 0.5, 0.5]))
    assert kept is bias  # in place: a checkpointed buffer must not be replaced


def test_terms_with_a_loss_keep_the_specs_order():
    listed = [balance_spec.ZLoss(), balance_spec.LossFreeBias(update_rate=0.01), balance_spec.SwitchAux()]
    assert [term.kind for term in balance.loss_terms(listed)] == ["z_loss", "switch_aux"]
    assert balance.bias_update_rate(listed) == 0.01 and balance.bias_update_rate([]) is None
    with pytest.raises(ValueError, match="loss_free_bias"):
        balance.loss("loss_free_bias", random_decision(), torch.ones(6), 1)
