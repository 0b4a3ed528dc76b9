"""Where a sampled step's time goes: marks along the model's parts, forward and, by identity functions, in the backward pass.

A mark ends the part before it and begins the next, so that a step's parts sum to the step, whatever runs twice: what is recomputed in
the backward pass is time of the backward pass. No module keeps a clock and none hooks another: it travels in the forward pass's context.

Times are the host's on a CPU, events in the stream on a CUDA device; nothing here waits for the device but `milliseconds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from spec.events import PARTS, PASSES

Stamp = float | torch.cuda.Event
_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
_WITHOUT_PASS = ("data", "optimizer")


def stamp(*, cuda: bool) -> Stamp:
    """Now: seconds on the host, or an event in the current stream."""
    if not cuda:
        return time.perf_counter()
    event = _new_event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(begin: Stamp, end: Stamp) -> float:
    """From one stamp to another of the same kind; both events must be over."""
    if isinstance(begin, float) and isinstance(end, float):
        return 1000 * (end - begin)
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end))


class Laps:
    """The marks of one step on one rank. `sent_bytes` counts what `moe.parallel` sends to other ranks.

    `in_backward` says which pass a mark belongs to.
    """

    def __init__(self, device: torch.device) -> None:
        self.part, self.in_backward, self.sent_bytes = "data", False, 0
        self._cuda = device.type == "cuda"
        self._one = torch.ones((), device=device)
        self._marks: list[tuple[str, bool, Stamp]] = []
        self.mark(self.part)

    def mark(self, part: str) -> None:
        """From here on, time is `part`'s."""
        self.part = part
        self._marks.append((part, self.in_backward and part not in _WITHOUT_PASS, stamp(cuda=self._cuda)))

    def enter(self, part: str, x: Tensor) -> Tensor:
        """`x`, from whose use on time is `part`'s; in the backward pass, from its gradient on, time is again that of the part before."""
        before = self.part
        self.mark(part)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        passed: Tensor = _Boundary.apply(x, self, before)  # type: ignore[no-untyped-call]
        return passed

    def meet(self, group: dist.ProcessGroup | None) -> None:
        """Waits for the group's other ranks, which is `waiting`; what comes then is `communication`. Collective."""
        self.mark("waiting")
        dist.all_reduce(self._one, group=group)
        self.mark("communication")

    def milliseconds(self) -> NDArray[np.float32]:
        """float32[part, pass] of PARTS and PASSES, up to the last mark; waits for the device to come there."""
        spent = np.zeros((len(PARTS), len(PASSES)), np.float64)
        last = self._marks[-1][2]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        for (part, backward, begin), (_, _, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[PARTS.index(part), int(backward)] += milliseconds_between(begin, end)
        return spent.astype(np.float32)


@contextmanager
def together(laps: Laps | None, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around a collective of `group`, at a sampled step: the wait for the others, the communication, then again what it is a part of."""
    if laps is None:
        yield
        return
    part = laps.part
    laps.meet(group)
    yield
    laps.mark(part)


class _Boundary(torch.autograd.Function):
    """The identity, which tells the clock when its gradient has come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, laps: Laps, before: str) -> Tensor:
        ctx.laps, ctx.before = laps, before
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.laps.mark(ctx.before)
        return gradient, None, None
