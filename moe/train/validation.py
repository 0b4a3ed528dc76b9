"""Validation: the loss of each domain's held-out text, how evenly the router spreads all of it, and what each expert takes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.model import Output, Transformer
from moe.train.batches import UNPREDICTED, Batches
from moe.train.ranks import Ranks
from moe.train.specialisation import Specialisation, Tally
from moe.train.telemetry import max_vio


@dataclass(frozen=True)
class Validation:
    """Mean cross-entropy in nats per token: over all tokens, or the domains' means weighted as in training.

    `bits_per_byte` is the same loss per byte of the text that was to be predicted, which tokenizers share (separators count no byte).
    `max_vio_global` is over the whole validation set, mean over MoE layers. `batch_dependence`: see `batch_dependence`.
    """

    loss: float
    by_domain: dict[str, float]
    max_vio_global: float | None
    bits_per_byte: float | None = None
    specialisation: Specialisation | None = None
    batch_dependence: float | None = None


def validate(
    model: Transformer,
    batches: Batches,
    *,
    sequences: int,
    micro_batch: int,
    ranks: Ranks,
    autocast: Callable[[], AbstractContextManager[object]],
    interrupted: Callable[[], bool],
    specialisation: bool = False,
    probe_batch: bool = False,
) -> Validation | None:
    """Up to `sequences` sequences of each domain, `micro_batch` at a time on each rank; None if any rank was `interrupted`."""
    sums = _Sums(model, batches, sequences, ranks, specialisation=specialisation)
    stopping, dependence = False, None
    model.eval()
    try:
        with torch.no_grad():
            for domain in range(len(batches.domains)):
                rows = batches.validation(domain, sequences)
                for start in range(0, len(rows), micro_batch * ranks.size):
                    stopping = ranks.any(stopping or interrupted())
                    if stopping:
                        break
                    chosen = slice(start + ranks.rank, start + micro_batch * ranks.size, ranks.size)
                    counts = chosen.start < len(rows)
                    if not counts and not ranks.together:
                        break
                    # Ranks that hold a part of the weights each run them for each other: one that has no row left runs the first again, uncounted.
                    tokens_BS, targets_BS = (t.to(ranks.device) for t in batches.tokens_and_targets(rows[chosen if counts else slice(1)]))
                    with autocast():
                        output = model(tokens_BS, targets_BS, batches.documents(tokens_BS))
                    if counts:
                        sums.add(domain, chosen, targets_BS, output)
            if probe_batch and model.moe_layers and not ranks.any(stopping):
                with autocast():
                    dependence = batch_dependence(model, batches, max(2, micro_batch), ranks.device)
    finally:
        model.train()
    flag = torch.tensor([float(stopping)], dtype=torch.float64, device=ranks.device)
    total = ranks.gather(torch.cat([flag, sums.flat()])).sum(0).cpu().numpy()
    return None if total[0] else replace(sums.result(total[1:]), batch_dependence=dependence)


def batch_dependence(model: Transformer, batches: Batches, sequences: int, device: torch.device) -> float | None:
    """|a - b| / |b| over the logits of the first validation window: a alone, b in a batch of `sequences`; None where there is but one.

    More than rounding where tokens compete: under a capacity, or where experts choose. The model is in evaluation mode.
    """
    rows = batches.validation(0, sequences)
    if len(rows) < 2:
        return None
    tokens_BS = batches.tokens_and_targets(rows)[0].to(device)
    document_BS = batches.documents(tokens_BS)
    among_SV = model(tokens_BS, document_BS=document_BS).logits_BSV[0]
    alone_SV = model(tokens_BS[:1], document_BS=None if document_BS is None else document_BS[:1]).logits_BSV[0]
    exact_SV = among_SV.double()
    return float((alone_SV.double() - exact_SV).norm() / exact_SV.norm())


class _Sums:
    """What is summed over a validation on one rank, and what it means once it is summed over all. Letters: M domains, L layers, E experts."""

    def __init__(self, model: Transformer, batches: Batches, sequences: int, ranks: Ranks, *, specialisation: bool) -> None:
        layers, experts = len(model.moe_layers), model.spec.moe.n_experts if model.spec.moe else 0
        self._batches = batches
        self._losses_M3 = torch.zeros(len(batches.domains), 3, dtype=torch.float64, device=ranks.device)  # loss, tokens, bytes
        self._tokens_LE = torch.zeros(layers, experts, dtype=torch.float64, device=ranks.device)
        self._byte_lengths_V = batches.byte_lengths.to(ranks.device)
        self._tally = Tally(batches, layers, experts, sequences, ranks.device) if specialisation and layers else None

    def add(self, domain: int, rows: slice, targets_BS: Tensor, output: Output) -> None:
        """One micro-batch: the windows `rows` of `domain`."""
        assert output.lm_loss is not None
        predicted = targets_BS[targets_BS != UNPREDICTED]
        self._losses_M3[domain, 0] += output.lm_loss * predicted.numel()
        self._losses_M3[domain, 1] += predicted.numel()
        self._losses_M3[domain, 2] += self._byte_lengths_V[predicted].sum()
        if output.stats is not None:
            self._tokens_LE += output.stats.expert_tokens_LE
        if self._tally is not None:
            self._tally.add(domain, rows, output.choices)

    def flat(self) -> Tensor:
        """Everything, float64, for the reduction over ranks."""
        tally = [] if self._tally is None else [self._tally.sums()]
        return torch.cat([self._losses_M3.flatten(), self._tokens_LE.flatten(), *tally])

    def result(self, total: NDArray[np.float64]) -> Validation:
        """The meaning of `flat`, summed over the ranks."""
        n_losses, n_tokens = self._losses_M3.numel(), self._tokens_LE.numel()
        losses_M3 = total[:n_losses].reshape(-1, 3)
        tokens_LE = total[n_losses : n_losses + n_tokens].reshape(tuple(self._tokens_LE.shape))
        by_domain = {domain.name: float(loss / tokens) for domain, (loss, tokens, _) in zip(self._batches.domains, losses_M3, strict=True)}
        weights = self._batches.weights
        weighted_3 = losses_M3.sum(axis=0) if weights is None else weights @ (losses_M3 / losses_M3[:, 1:2])
        loss, tokens, size = weighted_3
        vio_L = max_vio(tokens_LE) if len(tokens_LE) else None
        return Validation(
            loss=float(loss / tokens),
            by_domain=by_domain,
            max_vio_global=None if vio_L is None else float(vio_L.mean()),
            bits_per_byte=float(loss / (size * math.log(2))) if size else None,
            specialisation=None if self._tally is None else self._tally.result(total[n_losses + n_tokens :]),
        )
