"""The MoE layer: h_t = sum_shared FFN(u_t) + sum_k g_tk FFN_k(u_t) (DeepSeekMoE, eq. 9), with its statistics.

Or both sums weighed against each other (residual MoE: Rajbhandari 2022, section 4.1.1), or gates on the experts' input (Llama 4).

Letters: B sequences, S tokens in each, T = B * S, D width, E experts, K chosen per token, N balancing terms with a loss.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import balance, dispatch
from moe.context import Context
from moe.experts import Experts
from moe.feedforward import FeedForward
from moe.parallel import Mesh, Routed
from moe.router_kinds import build_router
from moe.routing import Choice, Decision, LayerOutput, LayerStats
from spec.model import Model


class MoeLayer(nn.Module):
    """Router, routed experts and shared experts in the place of a feed-forward layer."""

    def __init__(self, spec: Model, mesh: Mesh | None = None) -> None:
        super().__init__()
        moe = spec.moe
        if moe is None:
            raise ValueError("model.moe is null: there is no MoE layer to build")
        self.spec = moe
        self.terms = balance.loss_terms(moe.balance)
        self.bias_rate = balance.bias_update_rate(moe.balance)
        biased = self.bias_rate is not None
        self.router = build_router(moe.router, spec.d_model, moe.n_experts, moe.top_k, biased=biased, vocab_size=spec.vocab_size)
        activation = moe.activation or spec.activation
        self.experts = Experts(moe.n_experts, spec.d_model, moe.d_expert, activation, biased=moe.bias == "expert", mesh=mesh)
        self.shared = FeedForward(spec.d_model, moe.n_shared * moe.shared_width, activation) if moe.n_shared else None
        self.shared_gate = nn.Parameter(torch.empty(1, spec.d_model)) if moe.combine == "sigmoid_gate" else None
        self.mix = nn.Linear(spec.d_model, 2) if moe.combine == "residual" else None  # of the routed output, then of the shared
        self.bias = nn.Parameter(torch.empty(spec.d_model)) if moe.bias == "layer" else None

    def forward(self, x_BSD: Tensor, context: Context) -> LayerOutput:
        """The layer's output [B, S, D], its weighted balancing loss, and its statistics."""
        x_TD = context.enter("router", x_BSD.flatten(0, 1))
        decision: Decision = self.router(x_TD, context.tokens_BS.flatten())
        expert_TK, gate_TK = decision.expert_TK, decision.gate_TK
        count_E = balance.counts(expert_TK, self.spec.n_experts) if decision.count_E is None else decision.count_E
        dropped_E = torch.zeros_like(count_E)
        most = dispatch.limit(self.spec.capacity, len(x_TD), self.spec.top_k, self.spec.n_experts, training=self.training)
        if most is not None:
            expert_TK, gate_TK, dropped_E, rerouted = dispatch.place(decision, self.router, most, self.spec.capacity)
            if rerouted is not None:
                decision = decision._replace(figures={**decision.figures, "rerouted": rerouted})
        else:
            most = self.router.most_per_expert(len(x_TD))
        routed = self._routed(x_TD, expert_TK, gate_TK, most, x_BSD, context)
        y_BSD = routed.y_TD.view_as(x_BSD)
        if routed.beside is not None:
            y_BSD = self._with_shared(y_BSD, routed.beside, x_BSD)
        if self.bias is not None:
            y_BSD = y_BSD + self.bias.to(y_BSD.dtype)
        y_BSD = context.enter("router", y_BSD)
        loss_N = [balance.loss(term, decision, count_E, len(x_BSD), self.spec) for term in self.terms]
        weighted = sum((term.coefficient * loss for term, loss in zip(self.terms, loss_N, strict=True)), x_TD.new_zeros((), dtype=torch.float32))
        if decision.loss is not None:
            weighted = weighted + decision.loss
        stats, choice = layer_stats(decision, count_E, dropped_E, loss_N)._replace(sent_P=routed.sent_P), Choice(expert_TK, gate_TK.detach())
        return LayerOutput(y_BSD, weighted, stats, balance.mean_prob(decision), decision.log_prob_T, choice)

    def _routed(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, most: int | None, x_BSD: Tensor, context: Context) -> Routed:
        """The routed experts' sum, [T, D], where an expert takes `most` assignments, and the shared experts' output beside it."""
        capacity, most_rows = most if self.spec.capacity.padded else None, most and self.spec.n_experts * most
        x_TD = context.enter("dispatch", x_TD)
        beside = None if self.shared is None else partial(self._shared, self.shared, x_BSD, context)
        if not self.router.gate_on_input:
            return self.experts(x_TD, expert_TK, gate_TK, capacity, beside, context.laps, most_rows)  # type: ignore[no-any-return]
        scaled_TKD = x_TD[:, None] * gate_TK[:, :, None].to(x_TD.dtype)
        rows_R1 = expert_TK.view(-1, 1), torch.ones_like(gate_TK).view(-1, 1)
        routed: Routed = self.experts(scaled_TKD.flatten(0, 1), *rows_R1, capacity, beside, context.laps, most_rows)
        return routed._replace(y_TD=routed.y_TD.view_as(scaled_TKD).sum(1))

    def _shared(self, shared: FeedForward, x_BSD: Tensor, context: Context) -> Tensor:
        part = "other" if context.laps is None else context.laps.part
        return context.enter(part, shared(context.enter("dense", x_BSD)))

    def _with_shared(self, routed_BSD: Tensor, shared_BSD: Tensor, x_BSD: Tensor) -> Tensor:
        """The two outputs joined as the spec's `combine` says."""
        if self.mix is not None:
            weight_BS2: Tensor = self.mix(x_BSD).softmax(-1)
            return weight_BS2[..., :1] * routed_BSD + weight_BS2[..., 1:] * shared_BSD
        if self.shared_gate is not None:
            shared_BSD = F.linear(x_BSD, self.shared_gate).sigmoid() * shared_BSD
        return routed_BSD + shared_BSD


@torch.no_grad()
def layer_stats(decision: Decision, count_E: Tensor, dropped_E: Tensor, loss_N: list[Tensor]) -> LayerStats:
    """What the layer tells about itself; nothing here waits for the device.

    This runs in every layer at every step: page faults on temporaries of [T, E] would cost more than the arithmetic.
    """
    prob_TE = decision.prob_TE.detach().float()
    lowest, highest = decision.logits_TE.detach().aminmax()
    return LayerStats(
        expert_tokens_E=count_E,
        dropped_E=dropped_E,
        router_prob_E=balance.mean_prob(decision).detach().float(),
        balance_loss_N=torch.stack([loss.detach().float() for loss in loss_N]) if loss_N else prob_TE.new_zeros(0),
        router_entropy=-torch.dot(prob_TE.flatten(), prob_TE.clamp_min(1e-30).log_().flatten()) / len(prob_TE),
        max_logit=torch.maximum(-lowest, highest).float(),
        figures={name: figure.detach() for name, figure in decision.figures.items()},
    )
