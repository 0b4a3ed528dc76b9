"""Milliseconds of each phase of a step: the host's clock on a CPU, events in the stream on a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event


class PhaseClock:
    """Call `mark(phase)` at the end of each phase, and `milliseconds` once the device has caught up."""

    def __init__(self, phases: tuple[str, ...], device: torch.device) -> None:
        self._phases = phases
        self._cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Begins a step."""
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def mark(self, phase: str) -> None:
        """Ends `phase`, which began at the mark before. A phase may come several times in a step."""
        self._marks.append((phase, self._now()))

    def milliseconds(self) -> list[float]:
        """Time of each phase since `start`, in the order of the phases."""
        total = dict.fromkeys(self._phases, 0.0)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                total[phase] += begin.elapsed_time(end)
            elif isinstance(begin, float) and isinstance(end, float):
                total[phase] += 1000 * (end - begin)
        return [total[phase] for phase in self._phases]

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = _new_event(enable_timing=True)
        event.record()
        return event
