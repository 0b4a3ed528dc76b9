"""What routing did: decisions of one layer, and the statistics of a whole forward pass. Returned, never stored.

Letters: T tokens, E experts, K chosen per token, L MoE layers, N balancing terms that have a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """The noise that a router put on its logits, differentiable: noisy = clean + N(0, 1) * std."""

    clean_TE: Tensor
    std_TE: Tensor
    noisy_TE: Tensor


class Decision(NamedTuple):
    """What one router decided. Experts are ordered by falling selection score, except where they were drawn at random."""

    logits_TE: Tensor
    prob_TE: Tensor  # a distribution over experts for every token
    expert_TK: Tensor  # int64; E where nothing was chosen
    gate_TK: Tensor
    log_prob_T: Tensor | None = None  # of the drawn expert, where the router learns by policy gradient
    figures: Mapping[str, Tensor] = {}  # scalars that this kind of router reports of itself
    score_TE: Tensor | None = None  # what the gates are made of, where the highest are taken
    choice_TE: Tensor | None = None  # detached: what the choice was made by (score and bias); -inf for experts outside the token's groups
    noise: Noise | None = None  # in training, where the router has any
    loss: Tensor | None = None  # what the router itself adds to the loss, weighted
    count_E: Tensor | None = None  # int64: assignments of each expert, where the choice was counted as it was made
    prob_E: Tensor | None = None  # mean of prob_TE over the tokens, likewise; differentiable


class LayerStats(NamedTuple):
    """The statistics of one MoE layer, detached."""

    expert_tokens_E: Tensor
    dropped_E: Tensor
    router_prob_E: Tensor
    balance_loss_N: Tensor
    router_entropy: Tensor
    max_logit: Tensor
    figures: Mapping[str, Tensor] = {}
    sent_P: Tensor | None = None  # rows sent to each rank that shares the experts, where any do


class Choice(NamedTuple):
    """Which experts ran for each token of one MoE layer, after any drop, and with which gates; detached."""

    expert_TK: Tensor  # int64; E where nothing was chosen or the expert was full
    gate_TK: Tensor


class LayerOutput(NamedTuple):
    """Of one MoE layer."""

    y_BSD: Tensor
    loss: Tensor  # the balancing terms that the layer can compute alone, each times its coefficient
    stats: LayerStats
    prob_E: Tensor  # mean probabilities, differentiable: for terms that need more than this layer and batch
    log_prob_T: Tensor | None
    choice: Choice


@dataclass(frozen=True)
class RoutingStats:
    """Routing of one forward pass over all MoE layers, in the layers' order; detached, on the model's device.

    Counts are int64, the rest float32. `expert_tokens_LE` counts assignments before any drop: a row sums to
    T * K, where a router fills every slot.
    """

    expert_tokens_LE: Tensor
    dropped_LE: Tensor
    router_prob_LE: Tensor  # mean over tokens
    balance_loss_LT: Tensor  # value of each of Transformer.balance_terms (the T), without its coefficient
    router_entropy_L: Tensor  # nats, mean over tokens
    max_logit: Tensor  # largest magnitude of a router logit, scalar
    figures: Mapping[str, Tensor] = field(default_factory=dict)  # float32 scalars, means over layers, by the name that telemetry shows
    attention_tokens_LE: Tensor | None = None  # of the attention experts of every layer, where there are any
    sent_LP: Tensor | None = None  # int64: rows that this rank sent to each rank that shares the experts with it

    @classmethod
    def stacked(cls, layers: Sequence[LayerStats]) -> RoutingStats:
        """The model's statistics from its layers'."""
        *columns, figures, sent = zip(*layers, strict=True)
        tokens, dropped, prob, balance, entropy, logit = (torch.stack(column) for column in columns)
        return cls(tokens, dropped, prob, balance, entropy, logit.max(), mean_figures(figures), sent_LP=_stacked(sent))

    @classmethod
    def merged(cls, parts: Sequence[RoutingStats]) -> RoutingStats:
        """Over the equally long micro-batches of one optimiser step: counts are summed, means averaged."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            expert_tokens_LE=torch.stack([part.expert_tokens_LE for part in parts]).sum(0),
            dropped_LE=torch.stack([part.dropped_LE for part in parts]).sum(0),
            router_prob_LE=torch.stack([part.router_prob_LE for part in parts]).mean(0),
            balance_loss_LT=torch.stack([part.balance_loss_LT for part in parts]).mean(0),
            router_entropy_L=torch.stack([part.router_entropy_L for part in parts]).mean(0),
            max_logit=torch.stack([part.max_logit for part in parts]).max(),
            attention_tokens_LE=_summed([part.attention_tokens_LE for part in parts]),
            sent_LP=_summed([part.sent_LP for part in parts]),
            figures=mean_figures([part.figures for part in parts]),
        )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """What there is, one behind the other."""
    counts = [part for part in parts if part is not None]
    return torch.stack(counts) if counts else None


def _summed(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of what there is."""
    counts = _stacked(parts)
    return None if counts is None else counts.sum(0)


def mean_figures(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Each figure's mean over the parts, all of which have the same names."""
    return {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
