"""A step's figures on their way to the host: at once on a CPU; on a CUDA device the copy is left to the stream, and is read a step later."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Reading(Protocol):
    """int32[R, n] that was begun to be copied from the device; what happens to it there later does not change what is read."""

    late: ClassVar[bool]  # whether reading at once would wait for the device

    def __init__(self, rows: Tensor) -> None: ...

    def array(self) -> NDArray[np.int32]:
        """The numbers, once they have arrived."""
        ...


class AtOnce:
    """Of a device that is done when its calls return."""

    late: ClassVar[bool] = False

    def __init__(self, rows: Tensor) -> None:
        self._rows: NDArray[np.int32] = rows.numpy()

    def array(self) -> NDArray[np.int32]:
        return self._rows


class Later:
    """Into pinned memory, behind what the stream has to do; an event tells when it is there."""

    late: ClassVar[bool] = True

    def __init__(self, rows: Tensor) -> None:
        self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        self._rows.copy_(rows, non_blocking=True)
        self._arrived = torch.cuda.Event(blocking=True)
        self._arrived.record()

    def array(self) -> NDArray[np.int32]:
        """Waits for this copy alone, not for what was handed to the device after it."""
        self._arrived.synchronize()
        rows: NDArray[np.int32] = self._rows.numpy()
        return rows


def of_device(device: torch.device) -> type[Reading]:
    """How figures are read from `device`."""
    return Later if device.type == "cuda" else AtOnce
