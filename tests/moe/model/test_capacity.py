"""Capacity: who is dropped, who is offered to the next best, and that nothing is lost or counted twice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.dispatch import drop_overflow, limit, offer, place, priority
from moe.router import top_k
from moe.router_kinds import build_router
from spec.moe import Moe
from spec.routing import Capacity, Router


def test_the_limit_is_the_ceiling_of_the_fair_share_times_the_factor():
    capacity = Capacity(kind="factor", factor=1.25, eval_factor=2.0)
    assert limit(capacity, 100, 2, 8, training=True) == 32  # 1.25 * 25 = 31.25
    assert limit(capacity, 100, 2, 8, training=False) == 50
    assert limit(Capacity(kind="factor", factor=1000), 100, 2, 8, training=True) == 100  # no token chooses an expert twice
    assert limit(Capacity(), 100, 2, 8, training=True) is None


@given(data=st.data(), n_tokens=st.integers(1, 12), k=st.integers(1, 3), n_experts=st.integers(1, 4), most=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_the_right_assignments_are_dropped(data, n_tokens, k, n_experts, most):
    draw = st.lists(st.lists(st.integers(0, n_experts), min_size=k, max_size=k), min_size=n_tokens, max_size=n_tokens)
    expert = torch.tensor(data.draw(draw))
    gate = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n_tokens * k, max_size=n_tokens * k))).view(n_tokens, k) / 4
    for rank in (None, gate):
        kept = drop_overflow(expert, rank, n_experts, most)
        for e in range(n_experts):
            slots = [(t, j) for t in range(n_tokens) for j in range(k) if expert[t, j] == e]
            if rank is not None:
                slots.sort(key=lambda slot: -float(gate[slot]))
            assert [int(kept[slot]) for slot in slots[:most]] == [e] * min(most, len(slots))
            assert all(int(kept[slot]) == n_experts for slot in slots[most:])
        assert (kept[expert == n_experts] == n_experts).all()


def test_random_selection_is_fair_in_training_and_repeats_in_evaluation():
    torch.manual_seed(0)
    gate, expert = torch.rand(200, 1), torch.zeros(200, 1, dtype=torch.int64)
    times = torch.zeros(200)
    for _ in range(400):
        kept = drop_overflow(expert, priority(gate, "random", training=True), 1, 50)
        assert int((kept == 0).sum()) == 50
        times += (kept[:, 0] == 0).float()
    assert times.min() > 50 and times.max() < 150  # 100 expected, 8.7 standard deviation
    first, second = (priority(gate, "random", training=False) for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second) and not torch.equal(first, gate)


def by_loop(choice: Tensor, wanted: Tensor, kept: Tensor, most: int) -> list[list[int]]:
    """Rounds as the docstring says, by position, with lists."""
    n_experts = choice.shape[1]
    final = kept.tolist()
    while True:
        room = [most - sum(row.count(e) for row in final) for e in range(n_experts)]
        offers: dict[int, list[tuple[int, int]]] = {}
        for t, row in enumerate(final):
            lost = [k for k, e in enumerate(row) if e == n_experts and int(wanted[t, k]) < n_experts]
            open_to = [e for e in range(n_experts) if room[e] > 0 and e not in row and choice[t, e] > -math.inf]
            if lost and open_to:
                best = max(open_to, key=lambda e: (float(choice[t, e]), -e))
                offers.setdefault(best, []).append((t, lost[0]))
        if not offers:
            return final
        for e, slots in offers.items():
            for t, k in slots[: room[e]]:
                final[t][k] = e


@given(data=st.data(), n_tokens=st.integers(1, 10), n_experts=st.integers(1, 5), most=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_the_next_best_never_exceeds_the_capacity_and_nothing_is_dropped_while_there_is_room(data, n_tokens, n_experts, most):
    k = data.draw(st.integers(1, n_experts))
    seed = data.draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(n_tokens, n_experts, generator=generator)
    choice[:, 0] += data.draw(st.sampled_from([0.0, 1.0]))  # all to one
    wanted = top_k(choice, k)
    drop = data.draw(st.sampled_from(["position", "probability", "random"]))
    rank = priority(choice.gather(1, wanted), drop, training=True)
    kept = drop_overflow(wanted, rank, n_experts, most)
    final = offer(choice, wanted, kept, rank, most)
    count = torch.bincount(final.flatten(), minlength=n_experts + 1)
    assert (count[:n_experts] <= most).all()
    assert torch.equal(final[kept < n_experts], kept[kept < n_experts])  # who has a place keeps it
    assert int(count.sum()) == n_tokens * k
    for row in final.tolist():
        placed = [e for e in row if e < n_experts]
        assert len(set(placed)) == len(placed)
        if len(placed) < k:
            assert all(count[e] == most for e in range(n_experts) if e not in placed)
    if drop == "position":
        assert final.tolist() == by_loop(choice, wanted, kept, most)


def test_no_offer_is_made_outside_the_tokens_groups():
    choice = torch.tensor([[0.9, 0.1, -math.inf], [0.8, 0.2, -math.inf], [0.7, 0.3, -math.inf]])
    wanted = torch.zeros(3, 1, dtype=torch.int64)
    final = offer(choice, wanted, drop_overflow(wanted, None, 3, 1), None, 1)
    assert final.tolist() == [[0], [1], [3]]


@pytest.mark.parametrize("kind", ["topk_softmax", "softmax_topk", "sigmoid_topk", "switch", "gshard", "noisy_topk"])
@pytest.mark.parametrize("drop", ["position", "probability", "random"])
def test_a_rerouted_token_gets_the_gates_of_its_new_experts(kind, drop):
    torch.manual_seed(1)
    k = 1 if kind == "switch" else 2
    router = build_router(Router(kind=kind), 8, 5, k, biased=False, vocab_size=10)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    decision = router(torch.randn(30, 8))
    placed = place(decision, router, 9 if k == 1 else 13, Capacity(kind="factor", drop=drop, overflow="next_best"))
    moved = (placed.expert_TK != decision.expert_TK) & (placed.expert_TK < 5)
    assert moved.any() and placed.rerouted is not None
    assert float(placed.rerouted) == pytest.approx(int(moved.sum()) / int((decision.expert_TK < 5).sum()))
    wanted = torch.where(placed.expert_TK < 5, placed.expert_TK, decision.expert_TK)
    assert decision.score_TE is not None
    for t in range(30):
        if not moved[t].any():
            assert torch.equal(placed.gate_TK[t], decision.gate_TK[t])
        elif (wanted[t] < 5).all():
            assert torch.equal(placed.gate_TK[t], router.gates(decision.logits_TE, decision.score_TE, wanted.clamp_max(4))[t])
    assert placed.gate_TK.requires_grad


@given(seed=st.integers(0, 1000), most=st.integers(0, 12), drop=st.sampled_from(["position", "probability", "random"]), again=st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_kept_and_what_is_dropped_make_up_all_assignments(seed, most, drop, again):
    torch.manual_seed(seed)
    router = build_router(Router(kind="gshard"), 4, 4, 2, biased=False, vocab_size=10)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    decision = router(torch.randn(11, 4))
    placed = place(decision, router, most, Capacity(kind="factor", drop=drop, overflow="next_best" if again else "drop"))
    chosen = torch.bincount(decision.expert_TK.flatten(), minlength=5)[:4]
    kept = torch.bincount(placed.expert_TK.flatten(), minlength=5)[:4]
    assert int(kept.sum() + placed.dropped_E.sum()) == int(chosen.sum())
    assert (placed.dropped_E >= 0).all() and (kept <= most).all()
    if not again:
        assert torch.equal(kept + placed.dropped_E, chosen)


def test_what_needs_a_capacity_is_refused_without_one():
    for wrong in ({"padded": True}, {"overflow": "next_best"}):
        with pytest.raises(ValueError, match=f"capacity.{next(iter(wrong))}.*needs capacity.kind factor"):
            Moe(capacity=Capacity(**wrong))
