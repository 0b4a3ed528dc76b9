"""Hash tables: distinct experts for every token, even loads from frequencies, clusters where tokens keep the same company."""

from __future__ import annotations

import heapq

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.hashing import balanced_table, clustered_table, k_means, random_table


def tables(vocab_size: int, n_experts: int, top_k: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    frequency_V = torch.randint(0, 50, (vocab_size,), generator=draw)
    vector_VW = torch.randn(vocab_size, 5, generator=draw) * (frequency_V > 10)[:, None]
    return {
        "random": random_table(vocab_size, n_experts, top_k, draw),
        "balanced": balanced_table(frequency_V, n_experts, top_k, seed),
        "clustered": clustered_table(vector_VW, n_experts, top_k, seed),
    }


@given(vocab_size=st.integers(1, 80), n_experts=st.integers(1, 9), data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_token_has_k_different_experts_and_a_seed_its_table(vocab_size, n_experts, data, seed):
    top_k = data.draw(st.integers(1, n_experts))
    again = tables(vocab_size, n_experts, top_k, seed)
    for name, table_VK in tables(vocab_size, n_experts, top_k, seed).items():
        assert table_VK.shape == (vocab_size, top_k) and table_VK.dtype == torch.int64, name
        assert int(table_VK.min()) >= 0 and int(table_VK.max()) < n_experts, name
        assert all(len(set(row)) == top_k for row in table_VK.tolist()), name
        assert torch.equal(table_VK, again[name]), name


def test_random_tables_spread_vocabularies_longer_than_a_block():
    table_VK = random_table(10_000, 8, 2, torch.Generator().manual_seed(0))
    count_E = torch.bincount(table_VK.flatten(), minlength=8)
    assert table_VK.shape == (10_000, 2) and (count_E - 2500).abs().max() < 6 * (2500 * 0.875) ** 0.5


def test_balanced_loads_are_those_of_the_greedy_rule():
    """Graham's bound for the largest first; the exact rule where no two frequencies are equal: the loads a plain loop reaches."""
    draw = torch.Generator().manual_seed(3)
    frequency_V = (1e6 / torch.arange(1, 301) ** 1.1).long() + torch.arange(300)  # Zipf's law, all different
    frequency_V = frequency_V[torch.randperm(300, generator=draw)]
    assert len(set(frequency_V.tolist())) == 300
    loads = [0.0] * 8
    for weight in sorted(frequency_V.tolist(), reverse=True):
        heapq.heapreplace(loads, loads[0] + weight)
    table_VK = balanced_table(frequency_V, 8, 1, seed=5)
    load_E = torch.zeros(8, dtype=torch.int64).index_add_(0, table_VK[:, 0], frequency_V)
    assert sorted(load_E.tolist()) == sorted(map(int, loads))


def test_balanced_beats_random_on_natural_frequencies():
    frequency_V = (1e5 / torch.arange(1, 5001)).long()

    def worst(table_VK: Tensor) -> float:
        load_E = torch.zeros(4, dtype=torch.int64).index_add_(0, table_VK.flatten(), frequency_V.repeat_interleave(table_VK.shape[1]))
        return float(load_E.max() / load_E.double().mean())

    assert worst(balanced_table(frequency_V, 4, 1, 0)) < 1.01
    assert worst(balanced_table(frequency_V, 4, 2, 0)) < 1.01
    assert worst(random_table(5000, 4, 1, torch.Generator().manual_seed(0))) > 1.05


def test_tokens_that_never_occur_are_spread_too():
    table_VK = balanced_table(torch.zeros(80, dtype=torch.int64), 8, 1, 0)
    assert torch.bincount(table_VK[:, 0], minlength=8).tolist() == [10] * 8


def test_seeds_give_other_tables():
    one, other = tables(60, 6, 2, 0), tables(60, 6, 2, 1)
    frequency_V, vector_VW = torch.ones(60, dtype=torch.int64), torch.randn(60, 5)
    assert not torch.equal(one["random"], other["random"])
    assert not torch.equal(balanced_table(frequency_V, 6, 2, 0), balanced_table(frequency_V, 6, 2, 1))
    assert not torch.equal(clustered_table(vector_VW, 6, 2, 0), clustered_table(vector_VW, 6, 2, 1))


def test_clusters_are_found():
    draw = torch.Generator().manual_seed(0)
    group_V = torch.arange(60) % 4
    vector_VW = 10 * torch.eye(4)[group_V] + 0.1 * torch.randn(60, 4, generator=draw)
    table_VK = clustered_table(vector_VW, 4, 2, seed=1)
    first_of = {group: set(table_VK[group_V == group, 0].tolist()) for group in range(4)}
    assert all(len(experts) == 1 for experts in first_of.values())
    assert set.union(*first_of.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(5))
def test_lloyd_ends_where_no_step_improves(seed):
    draw = torch.Generator().manual_seed(seed)
    vector_NW = torch.randn(200, 3, generator=draw).double()
    centre_EW = k_means(vector_NW, 7, draw)
    owner_N = torch.cdist(vector_NW, centre_EW).argmin(1)
    for expert in range(7):
        assert (owner_N == expert).any()
        torch.testing.assert_close(centre_EW[expert], vector_NW[owner_N == expert].mean(0))


def test_fewer_vectors_than_experts():
    vector_VW = torch.zeros(10, 4)
    vector_VW[3] = torch.tensor([1.0, 0, 0, 0])
    table_VK = clustered_table(vector_VW, 6, 3, seed=0)
    assert all(len(set(row)) == 3 for row in table_VK.tolist())
