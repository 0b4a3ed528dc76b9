"""SparseMixer-v2: two experts, drawn one after the other, with a gradient for the draw (Liu 2024, GRIN, sections 2.1-2.2).

The choice is discrete, so its gradient is estimated: with pi the softmax over the experts near the best and D the one drawn, the
derivative of the expected loss is an integral from 0 (no expert) to the drawn one. Heun's third-order rule takes it with weight 1/4
at the end and 3/4 at a third of the way (Liu 2023, SparseMixer, section 3): so the gate is pi_D with probability 1/4, a third of it
otherwise, while its gradient stays that of pi_D. The most probable expert is taken whole.

Letters: T tokens, E experts, K = 2 chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.router import ScoringRouter, drawn
from moe.routing import Decision

END_SHARE = 0.25  # Heun's third-order rule: weight of the end; the rest lies at a third of the way.


class SparseMixerRouter(ScoringRouter):
    """Top-2 of Phi-3.5-MoE. `jitter` says how near the best an expert must be to share the softmax, in training and evaluation."""

    def prepared(self, x_TD: Tensor) -> Tensor:
        """`x_TD` in the router's dtype: here jitter is no noise on the input."""
        return x_TD.to(self.arithmetic(x_TD))

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide: the best (in training: one drawn from those near it), then the best of the others likewise."""
        logits_TE = self.logits(self.prepared(x_TD))
        first_T1, first_gate_T1 = self._round(logits_TE, logits_TE)
        rest_TE = logits_TE.scatter(-1, first_T1, float("-inf"))
        second_T1, second_gate_T1 = self._round(rest_TE, logits_TE)
        expert_TK = torch.cat([first_T1, second_T1], -1)
        gate_TK = self.scaled(torch.cat([first_gate_T1, second_gate_T1], -1))
        return Decision(logits_TE, logits_TE.softmax(-1), expert_TK, gate_TK)

    def gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """Those of evaluation. -inf in a softmax gives an expert that is too far from the best of its round the gate 0."""
        rest_TE = logits_TE.scatter(-1, expert_TK[:, :1], float("-inf"))
        pair = [self._near(left_TE, logits_TE).softmax(-1) for left_TE in (logits_TE, rest_TE)]
        return self.scaled(torch.cat([prob_TE.gather(-1, expert_TK[:, k : k + 1]) for k, prob_TE in enumerate(pair)], -1))

    def _near(self, left_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """`left_TE` with -inf for what falls short of its best by more than 2 * jitter, relative to the larger of best and own size."""
        with torch.no_grad():
            best_T1 = left_TE.amax(-1, keepdim=True)
            size_TE = torch.maximum(logits_TE.abs(), best_T1)
            far_TE = best_T1 - logits_TE > 2 * self.spec.jitter * size_TE
        return left_TE.masked_fill(far_TE, float("-inf"))

    def _round(self, left_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Expert and gate [T, 1] of one round among the finite `left_TE`."""
        near_TE = self._near(left_TE, logits_TE)
        prob_TE = near_TE.softmax(-1)
        best_T1 = left_TE.argmax(-1, keepdim=True)
        if not self.training:
            return best_T1, prob_TE.gather(-1, best_T1)
        expert_T1 = drawn(near_TE.detach())
        gate_T1 = prob_TE.gather(-1, expert_T1)
        whole_T1 = (expert_T1 == best_T1) | (torch.rand_like(best_T1, dtype=torch.float32) > 1 - END_SHARE)
        return expert_T1, gate_T1 + torch.where(whole_T1, 0.0, -2 / 3 * gate_T1.detach())
