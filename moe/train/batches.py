"""Which tokens a step trains on: a pure function of (seed, step, rank), so that a loader has no state to save or lose.

A domain's stream is cut into windows of seq_len + 1 tokens that overlap by one; an epoch is a permutation of the windows
of all domains, so that each domain is read in proportion to its size. Where domains have weights, a cycle of CYCLE windows
is a permutation of each domain's quota instead, and each domain goes through epochs of its own.
Legend: B sequences, S seq_len, N windows, M domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe.train import token_classes
from moe.train.corpus import Domain
from moe.train.stop import SpecRefused
from moe.train.vocabulary import BYTES

CYCLE = 4096  # Windows over which the domains' shares are as their weights say, to the nearest window.
UNPREDICTED = -100  # The target where nothing is to be predicted.


class Batches:
    """Training batches and validation windows over the domains of a corpus."""

    def __init__(self, domains: list[Domain], seq_len: int, batch_size: int, seed: int, *, by_document: bool = False) -> None:
        """`by_document`: sequences tell where documents end. Raises SpecRefused where a part of a domain is shorter than one window."""
        for domain in domains:
            for part, stream in (("training", domain.training), ("validation", domain.validation)):
                if len(stream) <= seq_len:
                    raise SpecRefused("data.seq_len", f"{seq_len} is too long: the {part} part of {domain.name} has {len(stream)} tokens")
        self.domains = domains
        self.seq_len = seq_len
        self.batch_size = batch_size
        self._seed = seed
        self.vocabulary = domains[0].vocabulary if domains else BYTES
        self.by_document = by_document
        self.weights = domain_weights(domains)
        self._counts = [(len(domain.training) - 1) // seq_len for domain in domains]
        self._ends = np.cumsum(self._counts)
        self.windows = int(self._ends[-1])
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._quota = None if self.weights is None else quotas(self.weights, CYCLE)
        self._cycle = lru_cache(maxsize=2)(self._draw_cycle)
        self._classes = lru_cache(maxsize=len(domains))(self._classes_of)
        self._permutation_of = lru_cache(maxsize=2 * len(domains))(self._permute_domain)

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(self.windows)

    def windows_of(self, step: int) -> NDArray[np.int64]:
        """int64[B]: the windows of `step` (from 1), over all ranks and micro-batches."""
        places = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        if self._quota is not None:
            return np.array([self._weighted_window(int(place), self._quota) for place in places], np.int64)
        return np.array([self._permutation(int(place // self.windows))[place % self.windows] for place in places], np.int64)

    def _draw_cycle(self, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each place of the cycle its domain, and how many places before it have the same one."""
        assert self._quota is not None
        order = np.repeat(np.arange(len(self._quota)), self._quota)
        order = np.random.Generator(np.random.Philox(key=[self._seed, 2**63 + cycle])).permutation(order)
        before = np.empty_like(order)
        for domain, quota in enumerate(self._quota):
            before[order == domain] = np.arange(quota)
        return order, before

    def _permute_domain(self, domain: int, epoch: int) -> NDArray[np.int64]:
        key = [self._seed, ((domain + 1) << 40) + epoch]  # far from those of epochs and cycles
        return np.random.Generator(np.random.Philox(key=key)).permutation(self._counts[domain])

    def _weighted_window(self, place: int, quota: NDArray[np.int64]) -> int:
        """The window at `place`: the next one of the domain that the cycle names, in that domain's own epochs."""
        domain_of, before = self._cycle(place // CYCLE)
        domain = int(domain_of[place % CYCLE])
        read = place // CYCLE * int(quota[domain]) + int(before[place % CYCLE])
        first = int(self._ends[domain]) - self._counts[domain]
        return first + int(self._permutation_of(domain, read // self._counts[domain])[read % self._counts[domain]])

    def micro_batch(self, step: int, micro: int, micros: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, int64[b, S] each with b = B / (micros * world_size): this rank's share of a micro-batch of `step`."""
        share = self.batch_size // (micros * world_size)
        start = (micro * world_size + rank) * share
        rows = [self._training_window(int(window)) for window in self.windows_of(step)[start : start + share]]
        return self.tokens_and_targets(np.stack(rows))

    def _training_window(self, window: int) -> NDArray[Any]:
        index = int(np.searchsorted(self._ends, window, side="right"))
        first = (window - (int(self._ends[index - 1]) if index else 0)) * self.seq_len
        return self.domains[index].training[first : first + self.seq_len + 1]

    def validation(self, domain: int, sequences: int) -> NDArray[Any]:
        """[B', S + 1] with B' <= `sequences`: windows spread evenly over the domain's held-out stream, the same at every call."""
        stream = self.domains[domain].validation
        return np.stack([stream[first : first + self.seq_len + 1] for first in self.validation_firsts(domain, sequences)])

    def validation_firsts(self, domain: int, sequences: int) -> NDArray[np.int64]:
        """int64[B']: where in the held-out stream each window of `validation` begins."""
        count = (len(self.domains[domain].validation) - 1) // self.seq_len
        return np.unique(np.linspace(0, count - 1, min(sequences, count)).round().astype(np.int64)) * self.seq_len

    def validation_classes(self, domain: int, sequences: int) -> NDArray[np.uint8]:
        """uint8[B', S]: the class of each input token of `validation` (moe.train.token_classes)."""
        return self._classes(domain, sequences)

    def _classes_of(self, domain: int, sequences: int) -> NDArray[np.uint8]:
        return token_classes.of_windows(self.domains[domain], self.validation_firsts(domain, sequences), self.seq_len)

    @cached_property
    def byte_lengths(self) -> torch.Tensor:
        """float64[V]: the bytes of text that each token stands for."""
        return torch.tensor([len(piece) for piece in self.vocabulary.bytes_of], dtype=torch.float64)

    def tokens_and_targets(self, rows: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S + 1] as int64[B, S] inputs and the tokens that follow them.

        By document, the first token of a document is no target: what stands before it says nothing about it.
        """
        tokens = torch.from_numpy(rows.astype(np.int64))
        tokens_BS, targets_BS = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()  # of one row, contiguous() would be a view of the same memory
        if self.by_document:
            targets_BS[tokens_BS == self.vocabulary.separator] = UNPREDICTED
        return tokens_BS, targets_BS

    def documents(self, tokens_BS: torch.Tensor) -> torch.Tensor | None:
        """int64[B, S]: each token's document, counted from 0 in its sequence, the separator with the text before it; None unless by document."""
        if not self.by_document:
            return None
        ends_BS = (tokens_BS == self.vocabulary.separator).long()
        return ends_BS.cumsum(1) - ends_BS


def domain_weights(domains: Sequence[Domain]) -> NDArray[np.float64] | None:
    """float64[M] that add up to one; None where the domains have no weights."""
    if any(domain.weight is None for domain in domains):
        return None
    weights = np.array([domain.weight for domain in domains], np.float64)
    weights /= weights.sum()
    return weights


def quotas(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """int64[M] that add up to `total`: each weight's share, at least 1, the largest remainders rounded up."""
    spare = total - len(weights)
    exact = np.maximum(weights * total - 1, 0)
    exact *= spare / exact.sum()
    quota = np.floor(exact).astype(np.int64)
    remainder = np.argsort(quota - exact, kind="stable")[: spare - int(quota.sum())]
    quota[remainder] += 1
    return quota + 1
