"""Sorting assignments by expert, so that every expert's rows lie together: what the CPU path reads its work from.

Letters: T tokens, K experts chosen per token, E experts, R rows (one per kept assignment, plus padding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Where each assignment goes. Rows of one expert are consecutive and experts are in order.

    `token_R` is the token of a row (0 for padding); `row_TK` the row of an assignment, R for a dropped one; `size_E` the rows of
    each expert; `slot_N` the flat assignments (t * K + k) that were kept, in sorted order, and `kept_N` their rows.
    """

    token_R: Tensor
    row_TK: Tensor
    slot_N: Tensor
    kept_N: Tensor
    size_E: list[int]

    @property
    def n_rows(self) -> int:
        """R, padding included."""
        return len(self.token_R)


def make_plan(expert_TK: Tensor, n_experts: int, multiple: int = 1) -> Plan:
    """Sort the assignments stably by expert, each expert's rows padded to a multiple of `multiple`; expert E means dropped.

    Reads the counts back to the host, so it is for the CPU.
    """
    expert_N, slot_N = expert_TK.flatten().sort(stable=True)
    count_E = torch.bincount(expert_N, minlength=n_experts + 1)[:n_experts]
    padded_E = (count_E + (multiple - 1)).div_(multiple, rounding_mode="floor").mul_(multiple)
    size_E: list[int] = padded_E.tolist()
    n_rows = sum(size_E)
    kept = int(count_E.sum())
    expert_N, slot_N = expert_N[:kept], slot_N[:kept]
    shift_E = (padded_E - count_E).cumsum(0) - (padded_E - count_E)
    kept_N = torch.arange(kept) + shift_E[expert_N]
    token_R = torch.zeros(n_rows, dtype=torch.int64).index_copy_(0, kept_N, slot_N.div(expert_TK.shape[1], rounding_mode="floor"))
    row_TK = torch.full((expert_TK.numel(),), n_rows).index_copy_(0, slot_N, kept_N).view_as(expert_TK)
    return Plan(token_R, row_TK, slot_N, kept_N, size_E)
