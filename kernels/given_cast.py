"""A weight that has been cast already, in the weight's place: its gradient goes to the weight, in the weight's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.to(ctx.dtype), None


def given(weight: Tensor, cast: Tensor) -> Tensor:
    """As `weight.to(cast.dtype)`, whose result `cast` is, forward and backward."""
    taken: Tensor = _Given.apply(weight, cast)  # type: ignore[no-untyped-call]
    return taken
