"""The balancing term over the global batch (Qiu 2025): switch_aux with the counts of all ranks and of the step's micro-batches so far.

Each rank and micro-batch brings its own mean probabilities; the mean of their losses, which is what the step minimises, is then the
loss of one large batch. A domain that fills one micro-batch may so keep its own experts, as long as the whole step is even.

Letters: L MoE layers, E experts, N balancing terms that have a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe.laps import Laps, together
from moe.routing import LayerOutput, RoutingStats
from spec.balance import BalanceLoss


class GlobalBalance:
    """The counts of the step so far, and the term made from them."""

    def __init__(self, terms: Sequence[BalanceLoss]) -> None:
        self.column, self.coefficient = next((i, term.coefficient) for i, term in enumerate(terms) if term.kind == "global_aux")
        self._count_LE: Tensor | None = None

    def begin_step(self) -> None:
        """Forgets the micro-batches before."""
        self._count_LE = None

    def value(self, routed: Sequence[LayerOutput], *, training: bool, laps: Laps | None = None) -> Tensor:
        """float[L], unweighted, differentiable in the probabilities.

        Collective in training where there are ranks: one reduction of [L, E]. Evaluation neither waits for other ranks nor is remembered.
        """
        count_LE = torch.stack([layer.stats.expert_tokens_E for layer in routed])
        prob_LE = torch.stack([layer.prob_E for layer in routed])
        prob_LE = prob_LE.to(torch.promote_types(prob_LE.dtype, torch.float32))
        if training:
            if dist.is_available() and dist.is_initialized():
                with together(laps, None):
                    dist.all_reduce(count_LE)
            count_LE = self._count_LE = count_LE if self._count_LE is None else self._count_LE + count_LE
        share_LE = count_LE.to(prob_LE.dtype) / count_LE.sum(1, keepdim=True).clamp_min(1)
        return prob_LE.shape[1] * (share_LE * prob_LE).sum(1)

    def shown(self, stats: RoutingStats, value_L: Tensor) -> RoutingStats:
        """`stats` with the value in the term's column."""
        column_LN = stats.balance_loss_LT.clone()
        column_LN[:, self.column] = value_L.detach()
        return replace(stats, balance_loss_LT=column_LN)
