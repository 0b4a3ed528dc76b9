"""A router that learns by REINFORCE (Bengio 2013; RL-R in Clark 2022): expert by draw, reward by the token's loss.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.router import ScoringRouter, drawn
from moe.routing import Decision, LayerOutput

IGNORED = -100  # the target of a token that has no loss


class PolicyRouter(ScoringRouter):
    """In training one expert is drawn from the softmax, in evaluation the most probable is taken; the gate is 1 (times the scale).

    So no gradient reaches the router through the experts: it learns from `policy_loss`, which needs the tokens' losses and is
    therefore the model's to compute, and from the entropy, which keeps it exploring.
    """

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide; in training with the log-probability of what was drawn, and minus the weighted entropy as a loss."""
        logits_TE = self.logits(self.prepared(x_TD))
        log_prob_TE = logits_TE.log_softmax(-1)
        prob_TE = log_prob_TE.exp()
        if not self.training:
            expert_TK = prob_TE.detach().argmax(-1, keepdim=True)
            return Decision(logits_TE, prob_TE, expert_TK, self.gates(logits_TE, prob_TE, expert_TK))
        expert_TK = drawn(logits_TE.detach())
        entropy = -(prob_TE * log_prob_TE).sum(-1).mean()
        return Decision(
            logits_TE,
            prob_TE,
            expert_TK,
            self.gates(logits_TE, prob_TE, expert_TK),
            log_prob_T=log_prob_TE.gather(-1, expert_TK).squeeze(-1),
            loss=-self.spec.entropy_bonus * entropy,
        )

    def gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """One for each, times the scale."""
        return self.scaled(torch.ones_like(expert_TK, dtype=logits_TE.dtype))


def policy_loss(loss_T: Tensor, target_T: Tensor, log_prob_T: Tensor) -> Tensor:
    """Mean over tokens of (loss_t - b_t) log p_t: its gradient makes draws likelier whose token's loss lies below the baseline.

    b_t is the mean loss of the batch's other tokens, which does not depend on t's draw, so the estimate stays unbiased (but for
    what the draw does to later tokens through attention). Tokens whose target is -100 have no loss and teach nothing.
    """
    counted_T = target_T != IGNORED
    n = counted_T.sum()
    loss_T = loss_T.detach() * counted_T
    others_T = (loss_T.sum() - loss_T) / (n - 1).clamp_min(1)
    advantage_T = (loss_T - others_T) * (counted_T & (n > 1))
    return (advantage_T * log_prob_T).sum() / n.clamp_min(1)


def judged(layer: LayerOutput, loss_T: Tensor, target_T: Tensor, weight: float) -> LayerOutput:
    """`layer` with its policy loss, times `weight`, in its loss, and without the weight among its figures; as it is without a policy."""
    if layer.log_prob_T is None:
        return layer
    policy = policy_loss(loss_T, target_T, layer.log_prob_T)
    stats = layer.stats._replace(figures={**layer.stats.figures, "policy_loss": policy.detach()})
    return layer._replace(loss=layer.loss + weight * policy, stats=stats)
