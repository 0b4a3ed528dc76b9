"""Loss spikes: a loss far above its recent past, in deviations that a few outliers cannot move (median and MAD)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MAD_TO_SIGMA = 1.4826
# Below this share of the median a spread is rounding noise: a nearly constant loss must not spike on its last digits.
SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class Spike:
    """How far a loss lies above the window before it. `score` = (loss - median) / deviation."""

    loss: float
    median: float
    deviation: float
    score: float


class SpikeDetector:
    """Judges each loss against the `window` losses before it; silent until it has seen that many.

    A spike is told once, at the step where it begins; the next one needs a loss under the threshold in between.
    """

    def __init__(self, window: int, threshold: float, losses: Iterable[float] = (), inside: bool = False) -> None:
        """`losses` and `inside` continue an earlier detector."""
        self.window, self.threshold = window, threshold
        self.losses = deque(losses, maxlen=window)
        self.inside = inside

    def observe(self, loss: float) -> Spike | None:
        """Takes the next loss (finite), and returns the spike that begins with it, if one does."""
        found = self._judge(loss) if len(self.losses) == self.losses.maxlen else None
        begins = found is not None and not self.inside
        self.inside = found is not None
        self.losses.append(loss)
        return found if begins else None

    def _judge(self, loss: float) -> Spike | None:
        window = np.fromiter(self.losses, np.float64)
        median = float(np.median(window))
        spread = MAD_TO_SIGMA * float(np.median(np.abs(window - median)))
        deviation = max(spread, SMALLEST_SHARE * abs(median), math.ulp(1.0))
        score = (loss - median) / deviation
        return Spike(loss, median, deviation, score) if score > self.threshold else None
