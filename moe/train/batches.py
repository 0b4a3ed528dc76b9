"""Which tokens a step trains on: a pure function of (seed, step, rank), so that a loader has no state to save or lose.

A domain's stream is cut into windows of seq_len + 1 tokens that overlap by one; an epoch is a permutation of the windows
of all domains, so that each domain is read in proportion to its size. Legend: B sequences, S seq_len, N windows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from moe.train.corpus import Domain
from moe.train.stop import SpecRefused


class Batches:
    """Training batches and validation windows over the domains of a corpus."""

    def __init__(self, domains: list[Domain], seq_len: int, batch_size: int, seed: int) -> None:
        """Raises SpecRefused where a domain's training or validation part is shorter than one window."""
        for domain in domains:
            for part, stream in (("training", domain.training), ("validation", domain.validation)):
                if len(stream) <= seq_len:
                    raise SpecRefused("data.seq_len", f"{seq_len} is too long: the {part} part of {domain.name} has {len(stream)} tokens")
        self.domains = domains
        self.seq_len = seq_len
        self.batch_size = batch_size
        self._seed = seed
        counts = [(len(domain.training) - 1) // seq_len for domain in domains]
        self._ends = np.cumsum(counts)
        self.windows = int(self._ends[-1])
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(self.windows)

    def windows_of(self, step: int) -> NDArray[np.int64]:
        """int64[B]: the windows of `step` (from 1), over all ranks and micro-batches."""
        places = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        return np.array([self._permutation(int(place // self.windows))[place % self.windows] for place in places], np.int64)

    def micro_batch(self, step: int, micro: int, micros: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, int64[b, S] each with b = B / (micros * world_size): this rank's share of a micro-batch of `step`."""
        share = self.batch_size // (micros * world_size)
        start = (micro * world_size + rank) * share
        rows = [self._training_window(int(window)) for window in self.windows_of(step)[start : start + share]]
        return tokens_and_targets(np.stack(rows))

    def _training_window(self, window: int) -> NDArray[np.uint16]:
        index = int(np.searchsorted(self._ends, window, side="right"))
        first = (window - (int(self._ends[index - 1]) if index else 0)) * self.seq_len
        return self.domains[index].training[first : first + self.seq_len + 1]

    def validation(self, domain: int, sequences: int) -> NDArray[np.uint16]:
        """uint16[B', S + 1] with B' <= `sequences`: windows spread evenly over the domain's held-out stream, the same at every call."""
        stream = self.domains[domain].validation
        count = (len(stream) - 1) // self.seq_len
        firsts = np.unique(np.linspace(0, count - 1, min(sequences, count)).round().astype(np.int64)) * self.seq_len
        return np.stack([stream[first : first + self.seq_len + 1] for first in firsts])


def tokens_and_targets(rows: NDArray[np.uint16]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint16[B, S + 1] as int64[B, S] inputs and the tokens that follow them."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
