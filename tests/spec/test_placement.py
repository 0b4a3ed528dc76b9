"""Placement by load: a published example to the last slot, and what holds of every placement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.placement import Placement, balancedness, place, plain

# The example in the README of deepseek-ai/EPLB: 2 layers x 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs.
LOAD_LE = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
PUBLISHED_LS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def test_the_published_example_is_met() -> None:
    placed = place(LOAD_LE, replicas=16, groups=4, nodes=2, devices=8)
    assert placed.policy == "hierarchical"
    assert placed.expert_LS.tolist() == PUBLISHED_LS


def device_loads(placed: Placement, load_E: list[float], layer: int) -> list[float]:
    """As one would add them up."""
    slots = placed.expert_LS[layer].tolist()
    size = len(slots) // placed.devices
    return [sum(load_E[e] / slots.count(e) for e in slots[v * size : (v + 1) * size]) for v in range(placed.devices)]


def test_balancedness_is_mean_over_largest_device_load() -> None:
    placed = place(LOAD_LE, replicas=16, groups=4, nodes=2, devices=8)
    loads = [device_loads(placed, row.tolist(), layer) for layer, row in enumerate(LOAD_LE)]
    np.testing.assert_allclose(placed.device_load(LOAD_LE), loads)
    np.testing.assert_allclose(balancedness(placed.device_load(LOAD_LE)), [sum(row) / 8 / max(row) for row in loads])
    before = plain(2, 12, 4)
    assert before.device_load(LOAD_LE)[0].tolist() == [262, 330, 116, 325]
    assert before.on_device(1, 3) == [9, 10, 11]
    assert balancedness(np.zeros((1, 4))).tolist() == [1.0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_placement_holds_all_and_overloads_nobody(data: st.DataObject) -> None:
    nodes, per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    devices = nodes * per_node
    groups = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    n_experts = groups * data.draw(st.integers(1, 4))
    replicas = devices * data.draw(st.integers(-(-n_experts // devices), -(-n_experts // devices) + 3))
    load_LE = np.array(data.draw(st.lists(st.lists(st.integers(0, 50), min_size=n_experts, max_size=n_experts), min_size=1, max_size=3)))
    placed = place(load_LE, replicas, groups, nodes, devices)
    assert placed.expert_LS.shape == (len(load_LE), replicas)
    assert (placed.copies_LE >= 1).all()
    assert placed.copies_LE.sum(1).tolist() == [replicas] * len(load_LE)
    np.testing.assert_allclose(placed.device_load(load_LE).sum(1), load_LE.sum(1))
    np.testing.assert_array_equal(placed.expert_LS, place(load_LE, replicas, groups, nodes, devices).expert_LS)
    for layer, load_E in enumerate(load_LE):
        share_E = load_E / placed.copies_LE[layer]
        loads = placed.device_load(load_LE)[layer]
        if groups % nodes == 0:
            home = {}  # experts of a group stay on one node
            for slot, expert in enumerate(placed.expert_LS[layer].tolist()):
                node = slot // (replicas // nodes)
                assert home.setdefault(expert // (n_experts // groups), node) == node
        for node in range(nodes if groups % nodes == 0 else 1):
            inside = loads[node * per_node : (node + 1) * per_node] if groups % nodes == 0 else loads
            # Longest first into the lightest with room: two of a node's devices never differ by more than one copy of their slots.
            assert inside.max() - inside.min() <= share_E.max() + 1e-9


def test_more_copies_never_hurt_one_hot_expert() -> None:
    load_LE = np.array([[1000, 1, 1, 1, 1, 1, 1, 1]])
    even = [float(balancedness(place(load_LE, replicas, 1, 1, 4).device_load(load_LE))[0]) for replicas in (8, 12, 16, 32)]
    assert even == sorted(even)
    assert even[0] < 0.26 and even[-1] > 0.89


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((16, 4, 3, 8), "nodes 3 does not divide devices 8"),
        ((15, 4, 2, 8), "replicas 15 is not a multiple of devices 8"),
        ((8, 4, 2, 8), "replicas 8 < 12 experts"),
        ((16, 5, 1, 8), "groups 5 does not divide the 12 experts"),
    ],
)
def test_numbers_that_do_not_fit_are_named(numbers: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place(LOAD_LE, *numbers)
    with pytest.raises(ValueError, match="devices 5 does not divide the 12 experts"):
        plain(1, 12, 5)
