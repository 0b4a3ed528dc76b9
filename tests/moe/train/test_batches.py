"""The data order: a pure function of seed and step, each window once in an epoch, the ranks' shares a partition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe.train.batches import CYCLE, Batches, quotas
from moe.train.corpus import Domain
from moe.train.stop import SpecRefused
from spec.data import Data


def domain(name: str, start: int, training: int, validation: int = 50) -> Domain:
    """Streams of consecutive numbers, so that a token says where it comes from."""
    return Domain(name, np.arange(start, start + training, dtype=np.uint16), np.arange(start, start + validation, dtype=np.uint16))


DOMAINS = [domain("a", 0, 101), domain("b", 1000, 64), domain("c", 2000, 33)]


def batches(seed: int = 0, batch_size: int = 4, seq_len: int = 8) -> Batches:
    return Batches(DOMAINS, seq_len, batch_size, seed)


def test_an_epoch_reads_every_window_once() -> None:
    epoch = batches()
    assert epoch.windows == 12 + 7 + 4
    rows = [batches(batch_size=epoch.windows).micro_batch(step, 0, 1, 0, 1)[0][:, 0].tolist() for step in (1, 2)]
    everything = [*range(0, 96, 8), *range(1000, 1056, 8), *range(2000, 2032, 8)]
    assert sorted(rows[0]) == sorted(rows[1]) == everything
    assert rows[0] != rows[1] != everything


def test_targets_are_the_tokens_that_follow() -> None:
    tokens, targets = batches().micro_batch(3, 0, 1, 0, 1)
    assert tokens.shape == targets.shape == (4, 8)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens + 1, targets)


def test_depends_on_seed_and_step_alone() -> None:
    one, other = batches(seed=5), batches(seed=5)
    list(map(other.windows_of, range(1, 30)))
    assert np.array_equal(one.windows_of(17), other.windows_of(17))
    assert not np.array_equal(one.windows_of(17), batches(seed=6).windows_of(17))


@pytest.mark.parametrize(("micros", "ranks"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_a_batch_without_overlap(micros: int, ranks: int) -> None:
    whole = batches().micro_batch(7, 0, 1, 0, 1)[0]
    parts = [batches().micro_batch(7, micro, micros, rank, ranks)[0] for micro in range(micros) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), whole)


def test_validation_is_spread_over_the_held_out_stream() -> None:
    rows = batches().validation(1, 3)
    assert rows.shape == (3, 9)
    assert rows[:, 0].tolist() == [1000, 1016, 1040]
    assert batches().validation(1, 1000)[:, 0].tolist() == [1000, 1008, 1016, 1024, 1032, 1040]


@pytest.mark.parametrize("seq_len", [50, 200])
def test_a_sequence_longer_than_a_stream_is_refused_with_its_field(seq_len: int) -> None:
    with pytest.raises(SpecRefused, match=rf"^data\.seq_len: {seq_len} is too long: the \w+ part of \w+ has \d+ tokens"):
        batches(seq_len=seq_len)


# ----- weights and documents


def weighted(*weights: float, seed: int = 0, batch_size: int = 4) -> Batches:
    return Batches([dataclasses.replace(part, weight=weight) for part, weight in zip(DOMAINS, weights, strict=True)], 8, batch_size, seed)


def test_without_weights_the_order_is_the_permutation_of_all_windows() -> None:
    order = np.concatenate([batches(seed=5).windows_of(step) for step in range(1, 12)])
    epochs = [np.random.Generator(np.random.Philox(key=[5, epoch])).permutation(23) for epoch in range(2)]
    assert order.tolist() == np.concatenate(epochs)[:44].tolist()


def test_each_domain_is_read_as_often_as_its_weight_says() -> None:
    one = weighted(6, 3, 1, batch_size=64)
    windows = np.concatenate([one.windows_of(step) for step in range(1, 129)])
    counts = np.diff([0, *np.searchsorted(np.sort(windows), one._ends)])
    np.testing.assert_allclose(counts / len(windows), [0.6, 0.3, 0.1], atol=2 / CYCLE)
    half = windows[:CYCLE]
    assert abs(np.count_nonzero(half < one._ends[0]) / CYCLE - 0.6) < 2 / CYCLE


def test_a_weighted_domain_goes_through_epochs_of_its_own() -> None:
    one = weighted(6, 3, 1)
    windows = np.concatenate([one.windows_of(step) for step in range(1, 400)])
    for start, end in zip([0, *one._ends], one._ends, strict=False):
        mine = windows[(windows >= start) & (windows < end)]
        size = end - start
        epochs = [mine[at : at + size].tolist() for at in range(0, len(mine) - size, size)]
        assert len(epochs) > 8
        assert all(sorted(epoch) == list(range(start, end)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_the_weighted_order_depends_on_seed_and_step_alone() -> None:
    one, other = weighted(1, 2, 3, seed=5), weighted(1, 2, 3, seed=5)
    list(map(other.windows_of, range(1, 30)))
    assert np.array_equal(one.windows_of(1700), other.windows_of(1700))
    assert not np.array_equal(one.windows_of(1700), weighted(1, 2, 3, seed=6).windows_of(1700))
    assert torch.equal(
        torch.cat([one.micro_batch(7, micro, 2, rank, 2)[0] for micro in range(2) for rank in range(2)]), other.micro_batch(7, 0, 1, 0, 1)[0]
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50))
def test_quotas_add_up_and_leave_nobody_out(weights: list[float]) -> None:
    share = np.array(weights) / sum(weights)
    quota = quotas(share, 4096)
    assert quota.sum() == 4096
    assert quota.min() >= 1
    assert (np.abs(quota - share * 4096) <= 1 + len(weights) * np.maximum(share, 0.02)).all()


SEPARATED = [[1, 2, 256, 3, 4, 5, 256, 6], [256, 1, 256, 256, 2, 3, 4, 5]]


def test_by_document_tokens_are_numbered_and_beginnings_are_no_targets() -> None:
    one = Batches(DOMAINS, 8, 4, 0, by_document=True)
    tokens, targets = one.tokens_and_targets(np.array([[*row, 9] for row in SEPARATED], np.uint16))
    assert one.documents(tokens).tolist() == [[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 2, 3, 3, 3, 3]]
    assert targets.tolist() == [[2, 256, -100, 4, 5, 256, -100, 9], [-100, 256, -100, -100, 3, 4, 5, 9]]


def test_in_a_stream_every_token_is_predicted_from_all_before() -> None:
    tokens, targets = batches().tokens_and_targets(np.array([[*row, 9] for row in SEPARATED], np.uint16))
    assert batches().documents(tokens) is None
    assert targets.tolist() == [[*row[1:], 9] for row in SEPARATED]


@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_not_predicted_is_still_read(rows: int) -> None:
    one = Batches(DOMAINS, 8, 4, 0, by_document=True)
    read = np.array([[5, 256, 6, 7, 8, 256, 256, 9, 10]] * rows)
    tokens, targets = one.tokens_and_targets(read)
    assert tokens.tolist() == read[:, :-1].tolist()
    assert targets.tolist() == [[256, -100, 7, 8, 256, -100, -100, 10]] * rows


def test_weights_end_where_their_sum_would_not_be_a_number() -> None:
    with pytest.raises(ValidationError, match="weights"):
        Data(weights=[1e308, 1e308, 1e308])
    heaviest = Data(weights=[1e9, 1e-300, 1e9]).weights
    assert quotas(np.array(heaviest) / sum(heaviest), 4096).tolist() == [2048, 1, 2047]
