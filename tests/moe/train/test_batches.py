"""The data order: a pure function of seed and step, each window once in an epoch, the ranks' shares a partition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe.train.batches import Batches
from moe.train.corpus import Domain
from moe.train.stop import SpecRefused


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
