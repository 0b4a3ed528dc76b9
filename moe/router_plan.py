"""Routers that even out the loads over the batch before they choose, in training: linear assignment and Sinkhorn's iteration.

Both take each token's best in evaluation, so that no token depends on another.
Letters: T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.router_naive import top_k
from moe.assignment import assign, fair_shares
from moe.router import ScoringRouter
from moe.routing import Decision


class AssignmentRouter(ScoringRouter):
    """BASE layers (Lewis 2021, section 3): equal loads at the highest total score; the gate is the logistic of the chosen logit."""

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide; the figure first_choice is the share of tokens that got the expert of their highest logit."""
        logits_TE = self.logits(self.prepared(x_TD))
        best_T = logits_TE.argmax(-1)
        expert_T = assign(logits_TE.detach(), fair_shares(logits_TE.detach())) if self.training else best_T
        expert_TK = expert_T[:, None]
        gate_TK = self.gates(logits_TE, logits_TE.sigmoid(), expert_TK)
        return Decision(logits_TE, logits_TE.softmax(-1), expert_TK, gate_TK, figures={"first_choice": (expert_T == best_T).float().mean()})


class SinkhornRouter(ScoringRouter):
    """S-BASE (Clark 2022): the k highest of a plan with even loads; gates are the softmax of the logits.

    The plan is exp(logits), whose columns and rows are normalised in turn: entropic transport from tokens to equally large experts.
    """

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide; the figure sinkhorn_error is how far the plan's most uneven load lies from T / E, relative to it (0 in evaluation)."""
        logits_TE = self.logits(self.prepared(x_TD))
        prob_TE = logits_TE.softmax(-1)
        error = torch.zeros((), device=x_TD.device)
        choice_TE = prob_TE.detach()
        if self.training:
            choice_TE, error = sinkhorn(logits_TE.detach(), self.spec.sinkhorn_iterations)
        expert_TK = top_k(choice_TE, self.top_k)
        return Decision(logits_TE, prob_TE, expert_TK, self.gates(logits_TE, prob_TE, expert_TK), figures={"sinkhorn_error": error})


def sinkhorn(logits_TE: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The logarithm of the plan [T, E] (rows sum to 1, columns near T / E), and the largest relative error of a column."""
    log_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    log_load = math.log(log_TE.shape[0] / log_TE.shape[1])
    for _ in range(iterations):
        log_TE = log_TE - log_TE.logsumexp(0, keepdim=True) + log_load
        log_TE = log_TE - log_TE.logsumexp(1, keepdim=True)
    return log_TE, (log_TE.logsumexp(0) - log_load).expm1().abs().max()
