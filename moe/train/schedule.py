"""The learning rate of a step: linear warm-up, then a cosine down to a share of the peak, or constant."""

from __future__ import annotations

import math

from spec.training import Optimizer


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """The rate of `step` (from 1) out of `steps`. The warm-up's last step has the peak, the last step `min_lr_ratio` of it."""
    warmup = optimizer.warmup_steps
    if step <= warmup:
        return optimizer.lr * step / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    floor = optimizer.min_lr_ratio
    return optimizer.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
