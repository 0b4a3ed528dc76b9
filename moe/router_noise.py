"""Routers that take the k highest scores, with a chance of their own in training: GShard's second expert, and learned noise.

Letters: T tokens, D width, E experts, K chosen per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.router import TopKRouter
from moe.routing import Decision, Noise
from spec import routing


class GShardRouter(TopKRouter):
    """Top-2 of the softmax, gates divided by their sum; in training the second is kept with probability min(1, 2 g2).

    GShard (Lepikhin 2020), algorithm 1: where the second gate is small the place in the expert's buffer is better used by another
    token. A second expert that is not kept is E, with gate 0; the first gate stays as it is. Evaluation keeps both.
    """

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide; the figure second_kept is the share of tokens that kept their second expert."""
        both = super().decide(x_TD, tokens_T)
        expert_TK, gate_TK = both.expert_TK, both.gate_TK
        if not self.training:
            return both._replace(figures={"second_kept": torch.ones((), device=x_TD.device)})
        share_T = gate_TK[:, 1].detach().float() / self.spec.scale
        lost_T = torch.rand_like(share_T) >= 2 * share_T
        lost_TK = torch.stack([torch.zeros_like(lost_T), lost_T], 1)
        return both._replace(
            expert_TK=expert_TK.masked_fill(lost_TK, self.n_experts),
            gate_TK=gate_TK.masked_fill(lost_TK, 0.0),
            count_E=None,
            figures={"second_kept": 1 - lost_T.float().mean()},
        )


class NoisyTopKRouter(TopKRouter):
    """H = x W_g + N(0, 1) softplus(x W_noise); the k highest, gates softmax over them (Shazeer 2017, eq. 3-5).

    The noise is there in training alone; probabilities and logits are those without noise.
    """

    def __init__(self, spec: routing.Router, d_model: int, n_experts: int, top_k: int, *, biased: bool) -> None:
        super().__init__(spec, d_model, n_experts, top_k, biased=biased)
        self.noise_weight = nn.Parameter(torch.empty(n_experts, d_model))

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide; the figure noise_std is the mean standard deviation of the noise."""
        x_TD = self.prepared(x_TD)
        clean_TE = self.logits(x_TD)
        std_TE = F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype)))
        figures = {"noise_std": std_TE.detach().float().mean()}
        if not self.training:
            return self.take_best(clean_TE)._replace(figures=figures)
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        noise = Noise(clean_TE, std_TE, noisy_TE)
        return self.take_best(noisy_TE)._replace(logits_TE=clean_TE, prob_TE=clean_TE.softmax(-1), prob_E=None, figures=figures, noise=noise)
