"""Every kind of router against its rule written as loops in float64, and what must hold for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.assignment import fair_shares
from moe.router import Router, ScoringRouter, TopKRouter
from moe.router_expert_choice import ExpertChoiceRouter
from moe.router_kinds import build_router
from moe.router_noise import NoisyTopKRouter
from moe.router_plan import sinkhorn
from moe.router_policy import policy_loss
from moe.routing import Decision
from spec import routing
from spec.routing import TRAITS, RouterKind

WIDTH, VOCABULARY = 12, 40
LEARNED: list[RouterKind] = [kind for kind, traits in TRAITS.items() if traits.learned]


def router(kind: RouterKind, n_experts: int = 6, top_k: int = 2, *, seed: int = 0, std: float = 0.5, **options: Any) -> Router:
    """A router in float64 with normal weights."""
    torch.manual_seed(seed)
    if kind == "sparsemixer":
        options.setdefault("jitter", 0.2)
    built = build_router(routing.Router(kind=kind, **options), WIDTH, n_experts, top_k, biased=False, vocab_size=VOCABULARY)
    for name, parameter in built.named_parameters():
        if name != "temperature":
            torch.nn.init.normal_(parameter, std=std)
    return built.double()


def fitting_k(kind: RouterKind, n_experts: int, wanted: int) -> int:
    return n_experts if kind == "all_experts" else TRAITS[kind].top_k or min(wanted, n_experts)


def tokens(n_tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(n_tokens, WIDTH, generator=draw, dtype=torch.float64)
    return x_TD, torch.randint(0, VOCABULARY, (n_tokens,), generator=draw)


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


# ----- what holds for all


@pytest.mark.parametrize("kind", TRAITS)
@given(n_tokens=st.integers(1, 33), n_experts=st.integers(2, 7), k=st.integers(1, 7), seed=st.integers(0, 1000), training=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_decision_is_well_formed(kind, n_tokens, n_experts, k, seed, training):
    """Also one token, as many chosen as experts, and (seed 0) exact ties."""
    top_k = fitting_k(kind, n_experts, k)
    built = router(kind, n_experts, top_k, seed=seed, std=0.0 if seed == 0 else 0.5).train(training)
    x_TD, tokens_T = tokens(n_tokens, seed)
    decision = built(x_TD, tokens_T)
    assert decision.expert_TK.dtype == torch.int64 and decision.expert_TK.shape == decision.gate_TK.shape
    assert decision.logits_TE.shape == decision.prob_TE.shape == (n_tokens, n_experts)
    assert decision.gate_TK.dtype == torch.float64
    torch.testing.assert_close(decision.prob_TE.sum(-1), torch.ones(n_tokens, dtype=torch.float64))
    for experts, gates in zip(decision.expert_TK.tolist(), decision.gate_TK.tolist(), strict=True):
        real = [expert for expert in experts if expert < n_experts]
        assert len(set(real)) == len(real) and all(0 <= expert <= n_experts for expert in experts)
        assert all(0 <= gate <= 1 + 1e-9 for gate in gates)
        assert all(gate == 0 for expert, gate in zip(experts, gates, strict=True) if expert == n_experts)
        if kind not in ("gshard", "expert_choice"):
            assert len(real) == top_k
    assert all(figure.shape == () and figure.isfinite() for figure in decision.figures.values())


@pytest.mark.parametrize("kind", TRAITS)
def test_evaluation_repeats_itself_and_does_not_depend_on_the_others(kind):
    built = router(kind, top_k=fitting_k(kind, 6, 2)).eval()
    x_TD, tokens_T = tokens(30)
    first, second = built(x_TD, tokens_T), built(x_TD, tokens_T)
    assert torch.equal(first.expert_TK, second.expert_TK) and torch.equal(first.gate_TK, second.gate_TK)
    alone = built(x_TD[:10], tokens_T[:10])
    same = torch.equal(alone.expert_TK, first.expert_TK[:10, : alone.expert_TK.shape[1]])
    assert same == (kind != "expert_choice")


@pytest.mark.parametrize("kind", LEARNED)
def test_renaming_the_experts_renames_the_choices(kind):
    plain, renamed = router(kind, 5, fitting_k(kind, 5, 2), bias=True), router(kind, 5, fitting_k(kind, 5, 2), bias=True)
    new_name = torch.tensor([3, 0, 4, 1, 2, 5])  # 5: nothing
    with torch.no_grad():
        for name, parameter in renamed.named_parameters():
            parameter[new_name[:5]] = dict(plain.named_parameters())[name]
    x_TD, tokens_T = tokens(40)
    for mode in (True, False):
        if mode and kind in ("gshard", "noisy_topk", "sparsemixer", "reinforce"):
            continue  # they draw in training, in the experts' order
        one, other = plain.train(mode)(x_TD, tokens_T), renamed.train(mode)(x_TD, tokens_T)
        assert torch.equal(new_name[one.expert_TK], other.expert_TK)
        torch.testing.assert_close(one.gate_TK, other.gate_TK)
        torch.testing.assert_close(one.prob_TE, other.prob_TE[:, new_name[:5]])


@pytest.mark.parametrize("scorer", ["linear", "cosine", "mlp"])
@pytest.mark.parametrize("kind", LEARNED)
def test_gates_and_probabilities_have_the_right_gradient(kind, scorer):
    built = router(kind, 4, fitting_k(kind, 4, 2), scorer=scorer, scorer_dim=5, bias=True).eval()
    x_TD, tokens_T = tokens(3)
    parameters = tuple(built.parameters())

    def outputs(x_TD: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        decision = built(x_TD, tokens_T)
        return tuple(tensor for tensor in (decision.gate_TK, decision.prob_TE, decision.logits_TE) if tensor.requires_grad)

    assert torch.autograd.gradcheck(outputs, (x_TD.requires_grad_(), *parameters))


@pytest.mark.parametrize("kind", LEARNED)
def test_a_diverged_router_still_decides(kind):
    """A NaN must reach the loss, where the run is told; not an endless loop or an error that hides it."""
    built = router(kind, top_k=fitting_k(kind, 6, 2))
    x_TD, tokens_T = tokens(20)
    x_TD[3] = torch.nan
    decision = built(x_TD, tokens_T)
    assert decision.prob_TE.isnan().any() and int(decision.expert_TK.min()) >= 0 and int(decision.expert_TK.max()) <= 6


@pytest.mark.parametrize("kind", TRAITS)
def test_bfloat16_is_kept_to_and_near(kind):
    top_k = fitting_k(kind, 6, 2)
    built = router(kind, top_k=top_k, dtype="bfloat16").float().eval()
    exact = router(kind, top_k=top_k).float().eval()
    x_TD, tokens_T = tokens(20)
    rough, fine = built(x_TD.float(), tokens_T), exact(x_TD.float(), tokens_T)
    assert rough.gate_TK.dtype == rough.logits_TE.dtype == torch.bfloat16 and fine.gate_TK.dtype == torch.float32
    torch.testing.assert_close(rough.logits_TE.float(), fine.logits_TE, rtol=0.03, atol=0.06)
    assert built.train()(x_TD.float(), tokens_T).gate_TK.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "needed"), [("hash", True), ("random", True), ("switch", False)])
def test_tokens_are_needed_where_they_decide(kind, needed):
    built, (x_TD, _) = router(kind, top_k=1), tokens(4)
    if needed:
        with pytest.raises(ValueError, match=kind):
            built(x_TD)
    else:
        assert built(x_TD).expert_TK.shape == (4, 1)


# ----- scorers


@pytest.mark.parametrize("scorer", ["linear", "cosine", "mlp"])
def test_scorers_follow_their_formulas(scorer):
    built = router("softmax_topk", scorer=scorer, scorer_dim=5, bias=True)
    assert isinstance(built, ScoringRouter) and built.bias is not None
    x_TD, _ = tokens(7)
    logits_TE = built(x_TD).logits_TE.detach()
    weight, bias = built.weight.tolist(), built.bias.tolist()
    for t, x in enumerate(x_TD.tolist()):
        if built.down is None:
            z = x
        else:
            z = [sum(a * b for a, b in zip(row, x, strict=True)) for row in built.down.tolist()]
        for e, row in enumerate(weight):
            if scorer == "mlp":
                value = sum(w * 0.5 * v * (1 + math.erf(v / math.sqrt(2))) for w, v in zip(row, z, strict=True))
            else:
                value = sum(w * v for w, v in zip(row, z, strict=True))
            if scorer == "cosine":
                value /= math.hypot(*row) * math.hypot(*z) * 0.3
            assert float(logits_TE[t, e]) == pytest.approx(value + bias[e], rel=1e-6, abs=1e-8)


def test_the_temperature_stays_above_a_hundredth():
    built = router("softmax_topk", scorer="cosine", scorer_dim=5)
    assert isinstance(built, ScoringRouter) and built.temperature is not None
    with torch.no_grad():
        built.temperature.fill_(-3.0)
    logits_TE = built(tokens(20)[0]).logits_TE
    assert float(logits_TE.detach().abs().max()) <= 100 + 1e-6
    assert float(logits_TE.detach().abs().max()) > 30


# ----- kinds that take the highest scores


def test_llama_4_gates_are_the_sigmoid_of_the_kept_logits_and_go_on_the_input():
    built = router("sigmoid_input", bias=True, scale=1.5)
    assert built.gate_on_input and not router("sigmoid_topk").gate_on_input
    decision = built(tokens(20)[0])
    for row, experts, gates in zip(decision.logits_TE.tolist(), decision.expert_TK.tolist(), decision.gate_TK.tolist(), strict=True):
        assert experts == best(row, 2)
        assert gates == pytest.approx([1.5 / (1 + math.exp(-row[e])) for e in experts])


def test_all_experts_are_weighed_by_the_softmax():
    decision = router("all_experts", top_k=6)(tokens(20)[0])
    for row, experts, gates in zip(decision.logits_TE.tolist(), decision.expert_TK.tolist(), decision.gate_TK.tolist(), strict=True):
        assert experts == best(row, 6)
        assert gates == pytest.approx([softmax(row)[e] for e in experts])


def test_a_random_share_of_the_tokens_is_sent_anywhere_in_training_alone():
    n = 20_000
    built = router("softmax_topk", 8, 2, random_share=0.3)
    x_TD, tokens_T = tokens(n)
    built.eval()
    wanted_TK = built(x_TD, tokens_T).expert_TK
    decision = built.train()(x_TD, tokens_T)
    changed_T = (decision.expert_TK != wanted_TK).any(-1)
    expected = 0.3 * (1 - 1 / (8 * 7))  # a draw may repeat the ordered choice
    assert abs(float(changed_T.double().mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    drawn_E = torch.bincount(decision.expert_TK[changed_T].flatten(), minlength=8)
    share = int(changed_T.sum()) * 2 / 8
    assert (drawn_E - share).abs().max() < 6 * math.sqrt(share)
    torch.testing.assert_close(decision.gate_TK, decision.prob_TE.gather(1, decision.expert_TK))
    assert torch.equal(built.eval()(x_TD, tokens_T).expert_TK, wanted_TK)


@pytest.mark.parametrize("kind", [kind for kind, traits in TRAITS.items() if traits.biasable])
def test_gates_can_be_had_for_other_experts(kind):
    """What an assignment costs that moves to the next-best expert; the decision says which that is."""
    built, (x_TD, tokens_T) = router(kind).eval(), tokens(20)
    decision = built(x_TD, tokens_T)
    assert decision.score_TE is not None and decision.choice_TE is not None and not decision.choice_TE.requires_grad
    torch.testing.assert_close(built.gates(decision.logits_TE, decision.score_TE, decision.expert_TK), decision.gate_TK)
    next_TK = decision.choice_TE.topk(4).indices[:, [0, 2]][:, : built.top_k]
    gate_TK = built.gates(decision.logits_TE, decision.score_TE, next_TK)
    for row, experts, gates in zip(decision.logits_TE.tolist(), next_TK.tolist(), gate_TK.tolist(), strict=True):
        score = [1 / (1 + math.exp(-x)) for x in row] if kind.startswith("sigmoid") else softmax(row)
        kept = [score[e] for e in experts]
        total = 1 if kind in ("softmax_topk", "switch", "sigmoid_input") else sum(kept)
        assert gates == pytest.approx([value / total for value in kept])


@pytest.mark.parametrize(("kind", "options"), [("softmax_topk", {"renormalise": True}), ("sigmoid_topk", {}), ("gshard", {}), ("noisy_topk", {})])
def test_experts_without_any_score_have_gates_and_gradients_that_are_numbers(kind, options):
    """Chance sends tokens to experts whose score is 0 in float32: e to the -1000th, and the sigmoid of -1000."""
    built = build_router(routing.Router(kind=kind, random_share=1.0, **options), WIDTH, 8, 2, biased=False, vocab_size=VOCABULARY)
    assert isinstance(built, ScoringRouter)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.weight[1:, 0] = -1000.0
    x_TD = torch.ones(64, WIDTH, requires_grad=True)
    decision = built(x_TD)
    lost_T = ~(decision.expert_TK == 0).any(-1)
    assert lost_T.any() and decision.prob_TE.isfinite().all()
    assert decision.gate_TK.isfinite().all() and not decision.gate_TK[lost_T].any()
    decision.gate_TK.square().sum().backward()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all() and built.weight.grad is not None and built.weight.grad.isfinite().all()


# ----- GShard


def test_gshard_keeps_the_second_expert_with_probability_two_g2():
    n = 20_000
    built, (x_TD, tokens_T) = router("gshard", scale=2.0), tokens(n)
    both = built.eval()(x_TD, tokens_T)
    for row, experts, gates in zip(both.logits_TE[:50].tolist(), both.expert_TK[:50].tolist(), both.gate_TK[:50].tolist(), strict=True):
        assert experts == best(row, 2)
        first, second = (math.exp(row[e]) for e in experts)
        assert gates == pytest.approx([2 * first / (first + second), 2 * second / (first + second)])
    assert float(both.figures["second_kept"]) == 1
    decision = built.train()(x_TD, tokens_T)
    kept_T = decision.expert_TK[:, 1] < 6
    assert torch.equal(decision.expert_TK[:, 0], both.expert_TK[:, 0]) and torch.equal(decision.gate_TK[:, 0], both.gate_TK[:, 0])
    assert torch.equal(decision.expert_TK[kept_T], both.expert_TK[kept_T]) and torch.equal(decision.gate_TK[kept_T], both.gate_TK[kept_T])
    assert float(decision.figures["second_kept"]) == pytest.approx(float(kept_T.double().mean()))
    chance_T = both.gate_TK[:, 1].detach().clamp_max(1.0)  # 2 g2, as scale is 2
    for low in range(5):
        part_T = (chance_T >= low / 5) & (chance_T < (low + 1) / 5 + 1e-12)
        expected = float(chance_T[part_T].mean())
        spread = math.sqrt(float((chance_T[part_T] * (1 - chance_T[part_T])).sum())) / int(part_T.sum())
        assert int(part_T.sum()) > 50 and abs(float(kept_T[part_T].double().mean()) - expected) <= 5 * spread + 1e-9


# ----- noise


def test_noisy_logits_are_clean_ones_and_normal_noise_of_the_learned_width():
    built, (x_TD, tokens_T) = router("noisy_topk"), tokens(5000)
    assert isinstance(built, NoisyTopKRouter)
    decision = built(x_TD, tokens_T)
    noise = decision.noise
    assert noise is not None
    std_TE = torch.log1p(torch.exp(x_TD @ built.noise_weight.T)).detach()
    torch.testing.assert_close(noise.std_TE.detach(), std_TE)
    torch.testing.assert_close(noise.clean_TE, x_TD @ built.weight.T)
    torch.testing.assert_close(decision.logits_TE, noise.clean_TE)
    assert float(decision.figures["noise_std"]) == pytest.approx(float(std_TE.mean()), rel=1e-5)
    drawn = ((noise.noisy_TE - noise.clean_TE) / std_TE).detach().flatten()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(len(drawn)) and abs(float(drawn.std()) - 1) < 0.02
    for t in range(50):
        row = noise.noisy_TE[t].tolist()
        chosen = best(row, 2)
        assert decision.expert_TK[t].tolist() == chosen
        assert decision.gate_TK[t].tolist() == pytest.approx(softmax([row[e] for e in chosen]))


def test_noise_learns_and_is_silent_in_evaluation():
    built, (x_TD, tokens_T) = router("noisy_topk"), tokens(30)
    assert isinstance(built, NoisyTopKRouter)
    (built(x_TD, tokens_T).gate_TK * torch.randn(30, 2)).sum().backward()
    assert built.noise_weight.grad is not None and built.noise_weight.grad.abs().max() > 0
    still = built.eval()(x_TD, tokens_T)
    assert still.noise is None
    assert still.expert_TK.tolist() == [best(row, 2) for row in (x_TD @ built.weight.T).tolist()]


# ----- expert choice


@given(n_tokens=st.integers(1, 40), n_experts=st.integers(1, 7), k=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_expert_takes_exactly_its_best_tokens(n_tokens, n_experts, k, seed):
    k = min(k, n_experts)
    decision = router("expert_choice", n_experts, k, seed=seed)(*tokens(n_tokens, seed))
    prob = [softmax(row) for row in decision.logits_TE.tolist()]
    most = math.ceil(k * n_tokens / n_experts)
    wanted: list[dict[int, float]] = [{} for _ in range(n_tokens)]
    for e in range(n_experts):
        for t in best([row[e] for row in prob], most):
            wanted[t][e] = prob[t][e]
    for t, (experts, gates) in enumerate(zip(decision.expert_TK.tolist(), decision.gate_TK.tolist(), strict=True)):
        got = {e: g for e, g in zip(experts, gates, strict=True) if e < n_experts}
        assert got == pytest.approx(wanted[t])
    assert decision.expert_TK.shape[1] == max(len(row) for row in wanted)
    assert float(decision.figures["unserved_tokens"]) == pytest.approx(sum(not row for row in wanted) / n_tokens)


def test_with_a_slot_for_every_expert_the_choice_is_the_same(monkeypatch):
    """What runs where looking for the widest token would wait for the device."""
    built, (x_TD, tokens_T) = router("expert_choice", 5), tokens(30)
    narrow = built(x_TD, tokens_T)
    monkeypatch.setattr(ExpertChoiceRouter, "width", lambda self, taken_TE: self.n_experts)
    wide = built(x_TD, tokens_T)
    used = narrow.expert_TK.shape[1]
    assert wide.expert_TK.shape == (30, 5) and used < 5
    assert torch.equal(wide.expert_TK[:, :used], narrow.expert_TK) and torch.equal(wide.gate_TK[:, :used], narrow.gate_TK)
    assert (wide.expert_TK[:, used:] == 5).all() and not wide.gate_TK[:, used:].any()


# ----- plans


def test_assignment_fills_experts_equally_and_gates_by_the_logistic():
    built, (x_TD, tokens_T) = router("linear_assignment", top_k=1, bias=True), tokens(40)
    decision = built(x_TD, tokens_T)
    assert torch.equal(torch.bincount(decision.expert_TK.flatten(), minlength=6), fair_shares(decision.logits_TE))
    torch.testing.assert_close(decision.gate_TK, 1 / (1 + (-decision.logits_TE.gather(1, decision.expert_TK)).exp()))
    best_T = decision.logits_TE.argmax(1)
    assert float(decision.figures["first_choice"]) == pytest.approx(float((decision.expert_TK[:, 0] == best_T).double().mean()))
    greedy = built.eval()(x_TD, tokens_T)
    assert torch.equal(greedy.expert_TK[:, 0], best_T) and float(greedy.figures["first_choice"]) == 1


def test_sinkhorn_is_alternating_normalisation():
    logits_TE = tokens(9)[0][:, :4] * 2
    plan = [[math.exp(value) for value in row] for row in logits_TE.tolist()]
    for _ in range(5):
        for e in range(4):
            column = sum(row[e] for row in plan)
            for row in plan:
                row[e] *= 9 / 4 / column
        plan = [[value / sum(row) for value in row] for row in plan]
    log_TE, error = sinkhorn(logits_TE, 5)
    torch.testing.assert_close(log_TE.exp(), torch.tensor(plan, dtype=torch.float64))
    assert float(error) == pytest.approx(max(abs(sum(row[e] for row in plan) / (9 / 4) - 1) for e in range(4)))
    assert float(sinkhorn(logits_TE, 500)[1]) < 1e-6 < float(error)


def test_sinkhorn_takes_the_best_of_the_plan_in_training_and_of_the_logits_in_evaluation():
    built, (x_TD, tokens_T) = router("sinkhorn", sinkhorn_iterations=50), tokens(200)
    with torch.no_grad():
        built.weight[0] += 5 * x_TD.mean(0)
    trained = built(x_TD, tokens_T)
    plan_TE, error = sinkhorn(trained.logits_TE, 50)
    assert trained.expert_TK.tolist() == [best(row, 2) for row in plan_TE.tolist()]
    torch.testing.assert_close(trained.gate_TK, trained.logits_TE.softmax(-1).gather(1, trained.expert_TK))
    assert float(trained.figures["sinkhorn_error"]) == pytest.approx(float(error.detach()))
    greedy = built.eval()(x_TD, tokens_T)
    assert greedy.expert_TK.tolist() == [best(row, 2) for row in greedy.logits_TE.tolist()]
    spread = [float(torch.bincount(decision.expert_TK.flatten(), minlength=6).double().std()) for decision in (trained, greedy)]
    assert spread[0] < spread[1]


# ----- policy gradient


def test_the_policy_draws_from_its_softmax_and_says_how_likely_that_was():
    n = 20_000
    built = router("reinforce", top_k=1, scale=1.5)
    x_TD = tokens(1)[0].expand(n, -1)
    decision = built(x_TD, torch.zeros(n, dtype=torch.int64))
    prob_E = decision.prob_TE[0]
    share_E = torch.bincount(decision.expert_TK.flatten(), minlength=6) / n
    assert ((share_E - prob_E).abs() < 5 * (prob_E * (1 - prob_E) / n).sqrt()).all()
    assert (decision.gate_TK == 1.5).all()
    assert decision.log_prob_T is not None and decision.loss is not None
    torch.testing.assert_close(decision.log_prob_T.exp(), decision.prob_TE.gather(1, decision.expert_TK)[:, 0])
    torch.testing.assert_close(decision.loss, 0.01 * (prob_E * prob_E.log()).sum())
    greedy = built.eval()(x_TD, torch.zeros(n, dtype=torch.int64))
    assert greedy.log_prob_T is None and greedy.loss is None and (greedy.expert_TK == prob_E.argmax()).all()


def test_the_policy_loss_is_its_formula_with_the_others_as_baseline():
    loss, log_prob, target = [2.0, 1.0, 4.0, 9.0], [-0.1, -0.5, -2.0, -3.0], [5, 6, 7, -100]
    wanted = 0.0
    for t in range(3):
        others = [loss[i] for i in range(3) if i != t]
        wanted += (loss[t] - sum(others) / 2) * log_prob[t] / 3
    log_prob_T = torch.tensor(log_prob, requires_grad=True)
    got = policy_loss(torch.tensor(loss), torch.tensor(target), log_prob_T)
    assert float(got.detach()) == pytest.approx(wanted)
    got.backward()
    assert log_prob_T.grad is not None and log_prob_T.grad[3] == 0 and log_prob_T.grad[2] > 0 > log_prob_T.grad[1]
    for n in (0, 1):  # nothing to compare with
        alone = policy_loss(torch.ones(3), torch.tensor([4] * n + [-100] * (3 - n)), torch.full((3,), -1.0))
        assert float(alone) == 0


def test_on_a_bandit_the_policy_moves_to_the_better_expert():
    built = router("reinforce", 4, 1, std=0.01).float()
    cost_E = torch.tensor([3.0, 1.0, 2.0, 3.0])
    optimizer = torch.optim.SGD(built.parameters(), lr=0.3)
    x_TD = torch.ones(64, WIDTH)
    tokens_T = torch.zeros(64, dtype=torch.int64)
    for _ in range(150):
        decision: Decision = built(x_TD, tokens_T)
        assert decision.log_prob_T is not None
        optimizer.zero_grad()
        policy_loss(cost_E[decision.expert_TK[:, 0]], tokens_T, decision.log_prob_T).backward()
        optimizer.step()
    assert float(built(x_TD, tokens_T).prob_TE[0, 1].detach()) > 0.95


def test_the_entropy_bonus_keeps_the_policy_open():
    built = router("reinforce", 4, 1, entropy_bonus=1.0).float()
    optimizer = torch.optim.SGD(built.parameters(), lr=1.0)
    x_TD, tokens_T = tokens(16)
    entropies = []
    for _ in range(60):
        decision = built(x_TD.float(), tokens_T)
        assert decision.loss is not None
        entropies.append(-float(decision.loss.detach()))
        optimizer.zero_grad()
        decision.loss.backward()
        optimizer.step()
    assert entropies[0] < entropies[-1] > math.log(4) - 0.05


# ----- without scores


def test_hash_goes_by_token_alone():
    built, (x_TD, tokens_T) = router("hash", scale=3.0), tokens(60)
    decision = built(x_TD, tokens_T)
    table = dict(built.named_buffers())["table_VK"].tolist()
    assert decision.expert_TK.tolist() == [table[token] for token in tokens_T.tolist()]
    assert torch.equal(decision.expert_TK, built(torch.randn_like(x_TD), tokens_T).expert_TK)
    assert (decision.gate_TK == 1.5).all() and (decision.logits_TE == 0).all() and not list(built.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_random_is_uniform(training):
    n = 20_000
    built = router("random", 5, 2).train(training)
    x_TD, tokens_T = tokens(n)
    pair_T = built(x_TD, tokens_T).expert_TK.sort(-1).values @ torch.tensor([5, 1])
    counts = torch.bincount(pair_T, minlength=25)
    pairs = counts[counts > 0]
    assert len(pairs) == 10  # each pair of different experts
    chi_squared = float(((pairs - n / 10) ** 2 / (n / 10)).sum())
    assert chi_squared < 33.7  # of 9 degrees of freedom: one in ten thousand lies above
    other = router("random", 5, 2, seed=1).train(training)(x_TD, tokens_T)
    assert not torch.equal(other.expert_TK, built(x_TD, tokens_T).expert_TK)


def test_random_in_evaluation_differs_from_place_to_place():
    built = router("random", 5, 1).eval()
    same = built(torch.zeros(1000, WIDTH, dtype=torch.float64), torch.full((1000,), 7)).expert_TK
    assert torch.bincount(same[:, 0], minlength=5).min() > 150


# ----- at the door


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "hash", "scorer": "mlp"}, "scorer"),
        ({"kind": "random", "bias": True}, "bias"),
        ({"kind": "hash", "jitter": 0.1}, "jitter"),
        ({"kind": "sinkhorn", "random_share": 0.1}, "random_share"),
        ({"kind": "expert_choice", "n_groups": 2}, "top_groups"),
        ({"kind": "gshard", "renormalise": True}, "renormalise"),
    ],
)
def test_what_a_kind_cannot_use_is_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        routing.Router.model_validate(fields)


def test_the_sigmoid_of_the_input_chooses_by_logits_that_its_sigmoids_cannot_tell_apart() -> None:
    built = build_router(routing.Router(kind="sigmoid_input"), 2, 3, 1, biased=False, vocab_size=8)
    assert isinstance(built, TopKRouter)
    with torch.no_grad():
        built.weight.copy_(torch.tensor([[20.0, 0.0], [30.0, 0.0], [25.0, 0.0]]))
    decision = built(torch.tensor([[1.0, 0.0]]))
    assert decision.score_TE is not None and decision.score_TE.unique().numel() == 1
    assert decision.expert_TK.tolist() == [[1]]
