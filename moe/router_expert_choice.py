"""Experts choose tokens (Zhou 2022, section 3.2): perfect balance, but a token's experts depend on the tokens after it.

Letters: T tokens, E experts, C tokens that one expert takes, K experts of the token that most of them took.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.router_naive import top_k
from moe.router import ScoringRouter
from moe.routing import Decision


class ExpertChoiceRouter(ScoringRouter):
    """Each expert takes its C = ceil(k T / E) tokens of highest probability in the micro-batch; the gate is that probability."""

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide. Slots of a token beyond its experts hold E and gate 0; the figure unserved_tokens is the share without any."""
        logits_TE = self.logits(self.prepared(x_TD))
        prob_TE = logits_TE.softmax(-1)
        most = self.most_per_expert(len(x_TD))
        taken_TE = torch.zeros_like(prob_TE, dtype=torch.bool).scatter_(0, prob_TE.detach().topk(most, dim=0).indices, True)
        expert_TK = top_k(prob_TE.detach().masked_fill(~taken_TE, -1.0), self.width(taken_TE))
        empty_TK = ~taken_TE.gather(-1, expert_TK)
        gate_TK = self.gates(logits_TE, prob_TE, expert_TK).masked_fill(empty_TK, 0.0)
        unserved = (~taken_TE.any(-1)).float().mean()
        return Decision(logits_TE, prob_TE, expert_TK.masked_fill(empty_TK, self.n_experts), gate_TK, figures={"unserved_tokens": unserved})

    def most_per_expert(self, n_tokens: int) -> int:
        """C."""
        return math.ceil(self.top_k * n_tokens / self.n_experts)

    def width(self, taken_TE: Tensor) -> int:
        """K. Off the CPU, and compiled, it is E: to look for it would wait for the device, and empty slots cost only places in a sort there.

        The experts' buffers have room for E * C rows, not for T * E: see `most_per_expert`.
        """
        looks = taken_TE.device.type == "cpu" and not torch.compiler.is_compiling()
        return int(taken_TE.sum(-1).max()) if looks else self.n_experts
