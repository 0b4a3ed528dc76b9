"""Milliseconds of each phase of a step: the host's clock on a CPU, events in the stream on a CUDA device."""

from __future__ import annotations

import torch

from moe.laps import Laps, Stamp, milliseconds_between, stamp

_NEXT = {"data": "other", "forward": "other", "backward": "data", "reduce": "optimizer", "optimizer": "other"}
"""The part of the step that begins where a phase ends, until the model says otherwise."""


class PhaseClock:
    """Call `mark(phase)` at the end of each phase, and `milliseconds` once the device has caught up.

    `laps` tell a sampled step into finer parts; None at the others.
    """

    def __init__(self, phases: tuple[str, ...], device: torch.device, laps: Laps | None = None) -> None:
        """Begins a step."""
        self._phases = phases
        self._cuda = device.type == "cuda"
        self.laps = laps
        self._marks: list[tuple[str, Stamp]] = [("", stamp(cuda=self._cuda))]

    def mark(self, phase: str) -> None:
        """Ends `phase`, which began at the mark before. A phase may come several times in a step."""
        self._marks.append((phase, stamp(cuda=self._cuda)))
        if self.laps is not None:
            self.laps.in_backward = phase in ("forward", "backward")  # the reduction of the gradients belongs to the backward pass
            self.laps.mark(_NEXT[phase])

    def milliseconds(self) -> list[float]:
        """Time of each phase since the beginning, in the order of the phases."""
        total = dict.fromkeys(self._phases, 0.0)
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            total[phase] += milliseconds_between(begin, end)
        return [total[phase] for phase in self._phases]
