"""A Mixture-of-Experts layer, as a person describes it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from spec.balance import BalanceTerm, SwitchAux
from spec.part import Part, field
from spec.routing import Capacity, Router

Activation = Literal["swiglu", "geglu", "relu", "gelu", "swiglu_clamped"]
GATED: tuple[Activation, ...] = ("swiglu", "geglu", "swiglu_clamped")


def _default_balance() -> list[BalanceTerm]:
    return [SwitchAux()]


class Moe(Part):
    """A Mixture-of-Experts feed-forward layer."""

    n_experts: int = field(8, "Routed experts per layer.", ge=1, le=65536, unit="experts")
    top_k: int = field(2, "Experts that each token uses.", ge=1, le=4096, unit="experts")
    d_expert: int = field(256, "Hidden width of one expert.", ge=1, le=1048576, unit="dimensions")
    n_shared: int = field(0, "Experts that every token uses.", ge=0, le=256, unit="experts")
    d_shared: int | None = field(None, "Hidden width of one shared expert; empty means d_expert.", ge=1, le=1048576, unit="dimensions")
    activation: Activation | None = field(None, "Activation of the experts; empty means the model's (GLaM: gelu beside dense geglu).")
    bias: Literal["none", "expert", "layer"] = field(
        "none", "expert: one on each matrix of each expert (gpt-oss). layer: one on the layer's output (JetMoE)."
    )
    combine: Literal["sum", "sigmoid_gate", "residual"] = field(
        "sum",
        "How the shared experts' output joins the routed one: added; added times a sigmoid gate (Qwen1.5-MoE); or both weighed by a "
        "softmax over the two (residual MoE, DeepSpeed-MoE).",
    )
    first_k_dense: int = field(0, "The first layers that stay dense.", ge=0, le=10000, unit="layers")
    every: int = field(1, "Every n-th layer is MoE (1: all; 2: every other, starting with the second).", ge=1, le=10000, unit="layers")
    router: Router = Router()
    balance: list[BalanceTerm] = Field(
        default_factory=_default_balance,
        max_length=16,
        description="Balancing terms; any may be combined, none lets the router collapse.",
    )
    capacity: Capacity = Capacity()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} > n_experts {self.n_experts}")
        if self.combine != "sum" and not self.n_shared:
            raise ValueError(f"combine {self.combine} needs n_shared of at least 1")
        self._router_fits()
        self._balance_fits()
        return self

    def _router_fits(self) -> None:
        router = self.router
        if self.n_experts % router.n_groups:
            raise ValueError(f"router.n_groups {router.n_groups} does not divide n_experts {self.n_experts}")
        reachable = self.n_experts // router.n_groups * router.top_groups
        if router.n_groups > 1 and self.top_k > reachable:
            raise ValueError(
                f"top_k {self.top_k} > {reachable} experts in router.top_groups {router.top_groups} of router.n_groups {router.n_groups}"
            )
        if router.n_groups > 1 and router.group_score == "top2_sum" and self.n_experts // router.n_groups < 2:
            raise ValueError("router.group_score top2_sum needs at least 2 experts in a group")
        wanted = self.n_experts if router.kind == "all_experts" else router.traits.top_k
        if wanted is not None and self.top_k != wanted:
            raise ValueError(f"router.kind {router.kind} takes top_k {wanted}, not {self.top_k}")
        if self.capacity.kind == "factor" and not router.traits.capacity:
            raise ValueError(f"capacity.kind factor does not apply to router.kind {router.kind}, which fixes the loads itself")
        if self.capacity.overflow == "next_best" and not router.traits.biasable:
            raise ValueError(f"capacity.overflow next_best needs a router that takes the k highest scores, not {router.kind}")

        if self.capacity.padded and self.capacity.kind != "factor":
            raise ValueError(f"capacity.padded needs capacity.kind factor: {self.capacity.kind} has no capacity to pad to")
        if self.capacity.overflow == "next_best" and self.capacity.kind != "factor":
            raise ValueError(f"capacity.overflow next_best needs capacity.kind factor: {self.capacity.kind} has no overflow")

    def _balance_fits(self) -> None:
        router = self.router
        kinds = [term.kind for term in self.balance]
        if len(set(kinds)) < len(kinds):
            raise ValueError("balance lists the same term twice")
        if kinds and not router.traits.learned:
            raise ValueError(f"balance must be empty: router.kind {router.kind} has no scores that {kinds[0]} could act on")
        if "loss_free_bias" in kinds and not router.traits.biasable:
            raise ValueError(f"balance loss_free_bias needs a router that takes the k highest scores, not {router.kind}")
        if "load_cv2" in kinds and router.kind != "noisy_topk":
            raise ValueError(f"balance load_cv2 needs the noise of router.kind noisy_topk, not {router.kind}")
        for term in self.balance:
            if (term.kind == "device_aux" or term.kind == "communication_aux") and self.n_experts % term.n_devices:
                raise ValueError(f"balance {term.kind} n_devices {term.n_devices} does not divide n_experts {self.n_experts}")

    @property
    def shared_width(self) -> int:
        """Hidden width of one shared expert, in dimensions."""
        return self.d_expert if self.d_shared is None else self.d_shared
