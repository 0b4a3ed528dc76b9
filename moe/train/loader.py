"""Batches on their way to the device. On a CUDA device a thread prepares the next step's in pinned memory while this one's are learnt from.

What a step is made of is a function of (seed, step, rank) whoever prepares it (moe.train.batches), so nothing here is saved or lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from moe.train.batches import Batches
from moe.train.ranks import Ranks

Batch = tuple[Tensor, Tensor]


class Loader:
    """Tokens and targets of this rank's micro-batches, int64[b, S] each, step after step."""

    def __init__(self, batches: Batches, micros: int, ranks: Ranks, *, ahead: bool) -> None:
        """`ahead`: one step is prepared in advance. A CPU that learns has no time to spare for that: there it gains nothing."""
        self._batches, self._micros, self._ranks = batches, micros, ranks
        self._pinned = ranks.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "loader") if ahead else None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Those of `step`, on the device. Raises what their preparation raised."""
        for batch in self._prepared(step):
            yield self._sent(batch[0]), self._sent(batch[1])

    def close(self) -> None:
        """Ends the thread; what it had prepared is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def _prepared(self, step: int) -> list[Batch] | Iterator[Batch]:
        if self._pool is None:
            return self._prepare(step)
        ready = self._next[1].result() if self._next is not None and self._next[0] == step else list(self._prepare(step))
        self._next = step + 1, self._pool.submit(lambda: list(self._prepare(step + 1)))
        return ready

    def _prepare(self, step: int) -> Iterator[Batch]:
        for micro in range(self._micros):
            tokens_BS, targets_BS = self._batches.micro_batch(step, micro, self._micros, self._ranks.rank, self._ranks.size)
            yield (tokens_BS.pin_memory(), targets_BS.pin_memory()) if self._pinned else (tokens_BS, targets_BS)

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._ranks.device, non_blocking=True)
