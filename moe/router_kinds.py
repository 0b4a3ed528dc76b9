"""Which class routes by which kind. Each kind is described in `spec.routing.TRAITS`, each class where its source is named."""

from __future__ import annotations

from moe.router import Router, ScoringRouter, TopKRouter
from moe.router_expert_choice import ExpertChoiceRouter
from moe.router_noise import GShardRouter, NoisyTopKRouter
from moe.router_plan import AssignmentRouter, SinkhornRouter
from moe.router_policy import PolicyRouter
from moe.router_sparsemixer import SparseMixerRouter
from moe.router_unscored import HashRouter, RandomRouter
from spec import routing
from spec.routing import RouterKind

SCORING: dict[RouterKind, type[ScoringRouter]] = {
    "softmax_topk": TopKRouter,
    "topk_softmax": TopKRouter,
    "sigmoid_topk": TopKRouter,
    "sigmoid_input": TopKRouter,
    "switch": TopKRouter,
    "all_experts": TopKRouter,
    "gshard": GShardRouter,
    "noisy_topk": NoisyTopKRouter,
    "sparsemixer": SparseMixerRouter,
    "expert_choice": ExpertChoiceRouter,
    "linear_assignment": AssignmentRouter,
    "sinkhorn": SinkhornRouter,
    "reinforce": PolicyRouter,
}


def takes_highest(kind: RouterKind) -> bool:
    """Whether the k highest scores are what routers of this kind take."""
    return issubclass(SCORING.get(kind, Router), TopKRouter)


def build_router(spec: routing.Router, d_model: int, n_experts: int, top_k: int, *, biased: bool, vocab_size: int) -> Router:
    """A router of the spec's kind with weights that are still to be initialised; `biased` with a loss-free selection bias."""
    if spec.kind == "hash":
        return HashRouter(spec, n_experts, top_k, vocab_size)
    if spec.kind == "random":
        return RandomRouter(spec, n_experts, top_k)
    return SCORING[spec.kind](spec, d_model, n_experts, top_k, biased=biased)
