"""Validation: the loss of each domain's held-out text, and how evenly the router spreads all of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from moe.model import Transformer
from moe.train.batches import Batches, tokens_and_targets
from moe.train.ranks import Ranks
from moe.train.telemetry import max_vio


@dataclass(frozen=True)
class Validation:
    """Mean cross-entropy in nats per token. `max_vio_global` is over the whole validation set, mean over MoE layers."""

    loss: float
    by_domain: dict[str, float]
    max_vio_global: float | None


def validate(
    model: Transformer,
    batches: Batches,
    *,
    sequences: int,
    micro_batch: int,
    ranks: Ranks,
    autocast: Callable[[], AbstractContextManager[object]],
    interrupted: Callable[[], bool],
) -> Validation | None:
    """Up to `sequences` sequences of each domain, `micro_batch` at a time on each rank; None if any rank was `interrupted`."""
    layers, experts = len(model.moe_layers), model.spec.moe.n_experts if model.spec.moe else 0
    # One row per domain: summed loss, tokens; then the counts of all domains, and whether somebody wants to stop.
    sums = torch.zeros(len(batches.domains), 2, dtype=torch.float64, device=ranks.device)
    tokens_LE = torch.zeros(layers, experts, dtype=torch.float64, device=ranks.device)
    stopping = False
    model.eval()
    try:
        with torch.no_grad():
            for domain in range(len(batches.domains)):
                rows = batches.validation(domain, sequences)[ranks.rank :: ranks.size]
                for start in range(0, len(rows), micro_batch):
                    stopping = stopping or interrupted()
                    if stopping:
                        break
                    tokens_BS, targets_BS = (t.to(ranks.device) for t in tokens_and_targets(rows[start : start + micro_batch]))
                    with autocast():
                        output = model(tokens_BS, targets_BS)
                    sums[domain, 0] += output.lm_loss * targets_BS.numel()
                    sums[domain, 1] += targets_BS.numel()
                    if output.stats is not None:
                        tokens_LE += output.stats.expert_tokens_LE
    finally:
        model.train()
    flag = torch.tensor([float(stopping)], dtype=torch.float64, device=ranks.device)
    total = ranks.gather(torch.cat([sums.flatten(), tokens_LE.flatten(), flag])).sum(0).cpu().numpy()
    if total[-1]:
        return None
    loss_and_tokens = total[: sums.numel()].reshape(-1, 2)
    by_domain = {domain.name: float(loss / tokens) for domain, (loss, tokens) in zip(batches.domains, loss_and_tokens, strict=True)}
    loss, count = loss_and_tokens.sum(axis=0)
    vio_L = max_vio(total[sums.numel() : -1].reshape(layers, experts)) if layers else None
    return Validation(float(loss / count), by_domain, None if vio_L is None else float(vio_L.mean()))
