"""Capacity: who is dropped, and that nothing is lost or counted twice."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.dispatch import drop_overflow, limit
from spec.routing import Capacity


def test_the_limit_is_the_ceiling_of_the_fair_share_times_the_factor():
    capacity = Capacity(kind="factor", factor=1.25, eval_factor=2.0)
    assert limit(capacity, 100, 2, 8, training=True) == 32  # 1.25 * 25 = 31.25
    assert limit(capacity, 100, 2, 8, training=False) == 50
    assert limit(Capacity(), 100, 2, 8, training=True) is None


@given(data=st.data(), n_tokens=st.integers(1, 12), top_k=st.integers(1, 3), n_experts=st.integers(1, 4), most=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_the_right_assignments_are_dropped(data, n_tokens, top_k, n_experts, most):
    draw = st.lists(st.lists(st.integers(0, n_experts - 1), min_size=top_k, max_size=top_k), min_size=n_tokens, max_size=n_tokens)
    expert = torch.tensor(data.draw(draw))
    gate = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n_tokens * top_k, max_size=n_tokens * top_k))).view(n_tokens, top_k) / 4
    for drop in ("position", "probability"):
        kept = drop_overflow(expert, gate, n_experts, most, drop)
        for e in range(n_experts):
            slots = [(t, k) for t in range(n_tokens) for k in range(top_k) if expert[t, k] == e]
            if drop == "probability":
                slots.sort(key=lambda slot: -float(gate[slot]))
            assert [int(kept[slot]) for slot in slots[:most]] == [e] * min(most, len(slots))
            assert all(int(kept[slot]) == n_experts for slot in slots[most:])
