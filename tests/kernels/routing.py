"""Routings that are hard on an expert kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(kind: str, n_tokens: int, top_k: int, n_experts: int) -> Tensor:
    """int64[T, K] of distinct experts per token; expert E is a dropped assignment."""
    spread = torch.rand(n_tokens, n_experts).argsort(-1)[:, :top_k].clone()
    if kind == "empty experts":  # only the first K experts have tokens
        return torch.arange(top_k).expand(n_tokens, top_k).clone()
    if kind == "all to one":
        return torch.full((n_tokens, top_k), n_experts - 1)
    if kind == "dropped":
        spread[torch.rand(spread.shape) < 0.4] = n_experts
    if kind == "all dropped":
        spread[:] = n_experts
    return spread


KINDS = ("spread", "empty experts", "all to one", "dropped", "all dropped")
