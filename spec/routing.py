"""How a token chooses its experts, as a person describes it; and what an expert does that is chosen too often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

from pydantic import model_validator

from spec.part import Part, field

RouterKind = Literal[
    "softmax_topk",
    "topk_softmax",
    "sigmoid_topk",
    "sigmoid_input",
    "switch",
    "gshard",
    "noisy_topk",
    "sparsemixer",
    "expert_choice",
    "hash",
    "linear_assignment",
    "sinkhorn",
    "reinforce",
    "random",
    "all_experts",
]


@dataclass(frozen=True)
class Traits:
    """What a kind of router is and takes. `top_k` is the only one it takes, where it takes only one."""

    help: str
    top_k: int | None = None
    learned: bool = True  # It has scores that a gradient reaches, so that balancing losses can act on them.
    biasable: bool = False  # A loss-free bias, groups and a random share can change its choice: the k highest scores are taken.
    capacity: bool = True  # Experts can be overfull.


TRAITS: dict[RouterKind, Traits] = {
    "softmax_topk": Traits("softmax over all experts, keep k (DeepSeek-V2, OLMoE, Qwen)", biasable=True),
    "topk_softmax": Traits("softmax over the k kept (Mixtral, DBRX, gpt-oss)", biasable=True),
    "sigmoid_topk": Traits("sigmoid scores, normalised over the k kept (DeepSeek-V3)", biasable=True),
    "sigmoid_input": Traits("sigmoid of the k kept logits multiplies the experts' input (Llama 4)", biasable=True),
    "switch": Traits("top-1 of the softmax, with input jitter (Switch)", top_k=1, biasable=True),
    "gshard": Traits("top-2; in training the second expert is kept with probability min(1, 2 g2) (GShard, GLaM, ST-MoE)", top_k=2, biasable=True),
    "noisy_topk": Traits("learned Gaussian noise on the logits, softmax over the k kept (Shazeer 2017)", biasable=True),
    "sparsemixer": Traits("top-2, each gate a softmax over the experts near the best remaining one (Phi-3.5-MoE)", top_k=2),
    "expert_choice": Traits(
        "each expert takes its top tokens (Zhou 2022): sees future tokens, so a causal model's loss is not comparable", capacity=False
    ),
    "hash": Traits("a fixed table from token id to expert, no learned router (Hash Layers)", learned=False),
    "linear_assignment": Traits("equal loads at the highest total score in training, greedy in evaluation (BASE)", top_k=1, capacity=False),
    "sinkhorn": Traits("the k highest of the Sinkhorn-balanced scores in training, greedy in evaluation (S-BASE)"),
    "reinforce": Traits("an expert is drawn from the softmax and learned by policy gradient (RL-R)", top_k=1),
    "random": Traits("uniformly random, no learned router: a control", learned=False),
    "all_experts": Traits("softmax over all experts, all run (Jacobs 1991); top_k must be n_experts", capacity=False),
}
if set(TRAITS) != set(get_args(RouterKind)):
    raise AssertionError("every kind of router needs its traits")


LEARNED = [kind for kind, traits in TRAITS.items() if traits.learned]
BIASABLE = [kind for kind, traits in TRAITS.items() if traits.biasable]


class Router(Part):
    """How a token chooses its experts. Scores are float32 unless `dtype` says otherwise."""

    kind: RouterKind = field("topk_softmax", "The rule.", options={kind: f"{traits.help}." for kind, traits in TRAITS.items()})
    scorer: Literal["linear", "cosine", "mlp"] = field(
        "linear",
        "What scores the experts.",
        when={"kind": LEARNED},
        options={
            "linear": "A matrix.",
            "cosine": "The cosine with each expert's vector in a narrower space, over a learned temperature (X-MoE, Tutel).",
            "mlp": "A network of two layers.",
        },
    )
    scorer_dim: int = field(
        64,
        "Width of the space of scorer cosine, and of the hidden layer of scorer mlp.",
        ge=1,
        le=65536,
        unit="dimensions",
        when={"scorer": ["cosine", "mlp"]},
    )
    renormalise: bool = field(False, "Divide the k kept gates by their sum (Qwen3).", when={"kind": ["softmax_topk"]})
    scale: float = field(1.0, "Factor on every gate (DeepSeek-V2: 16, DeepSeek-V3: 2.5).", gt=0, le=1000)
    jitter: float = field(
        0.0,
        "In training the router's input is multiplied by U(1-e, 1+e) (Switch: 0.01). sparsemixer: how near the best an expert must be "
        "to share the softmax (Phi-3.5-MoE: 0.01), always; at 0 none does, and its gates, all 1, teach it nothing.",
        ge=0,
        lt=1,
        when={"kind": LEARNED},
    )
    random_share: float = field(
        0.0,
        "In training, the probability that a token's experts are drawn uniformly instead (epsilon-random; a control: 0.1).",
        ge=0,
        le=1,
        when={"kind": BIASABLE},
    )
    n_groups: int = field(
        1, "Expert groups (devices) for group-limited routing; 1 means unlimited.", ge=1, le=4096, unit="groups", when={"kind": BIASABLE}
    )
    top_groups: int = field(1, "Groups that a token may choose from (DeepSeek-V2: M devices).", ge=1, le=4096, unit="groups", when={"kind": BIASABLE})
    group_score: Literal["max", "top2_sum"] = field(
        "top2_sum", "A group's score: its best expert (DeepSeek-V2) or its best two (V3).", when={"kind": BIASABLE}
    )
    hash: Literal["random", "balanced", "clustered"] = field(
        "balanced",
        "The table from token id to expert.",
        when={"kind": ["hash"]},
        options={
            "random": "Drawn.",
            "balanced": "Evens out the loads by how often each token occurs in the corpus.",
            "clustered": "Puts tokens with similar neighbours into one expert.",
        },
    )
    sinkhorn_iterations: int = field(8, "Normalisations of rows and columns.", ge=1, le=1000, unit="iterations", when={"kind": ["sinkhorn"]})
    entropy_bonus: float = field(0.01, "Weight of the policy's entropy, which keeps it exploring.", ge=0, le=100, when={"kind": ["reinforce"]})
    policy_weight: float = field(0.01, "Weight of the policy gradient in the loss.", ge=0, le=100, when={"kind": ["reinforce"]})
    init_std: float = field(0.02, "Standard deviation of the router's initial weights.", gt=0, le=10, when={"kind": LEARNED})
    bias: bool = field(False, "A learned bias on the router's logits (gpt-oss).", when={"kind": LEARNED})
    dtype: Literal["float32", "bfloat16"] = field("float32", "Arithmetic of the router; bfloat16 shows what breaks.")

    @property
    def traits(self) -> Traits:
        """What this kind of router is and takes."""
        return TRAITS[self.kind]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_groups > self.n_groups:
            raise ValueError(f"top_groups {self.top_groups} > n_groups {self.n_groups}")
        if self.renormalise and self.kind != "softmax_topk":
            raise ValueError(f"renormalise is for softmax_topk; {self.kind} fixes its own normalisation")
        if not self.traits.biasable:
            if self.top_groups < self.n_groups:
                raise ValueError(f"top_groups limits routers that take the k highest scores; {self.kind} chooses otherwise")
            if self.random_share:
                raise ValueError(f"random_share goes with routers that take the k highest scores; {self.kind} chooses otherwise")
        if not self.traits.learned and (self.scorer != "linear" or self.bias or self.jitter):
            raise ValueError(f"{self.kind} scores nothing: scorer, bias and jitter do not apply")
        return self


_LIMITED = {"kind": ["factor"]}


class Capacity(Part):
    """How many tokens one expert may take in a batch."""

    kind: Literal["dropless", "factor"] = field(
        "dropless",
        "Whether there is a limit.",
        options={"dropless": "No limit.", "factor": "At most ceil(factor * k * T / E) tokens per expert."},
    )
    factor: float = field(1.25, "Capacity factor in training.", gt=0, le=1000, when=_LIMITED)
    eval_factor: float = field(2.0, "Capacity factor in evaluation.", gt=0, le=1000, when=_LIMITED)
    drop: Literal["position", "probability", "random"] = field(
        "position",
        "Which assignments an overfull expert gives up.",
        when=_LIMITED,
        options={
            "position": "The last in the batch (Switch).",
            "probability": "Those with the lowest gate.",
            "random": "Random ones (random token selection, DeepSpeed).",
        },
    )
    overflow: Literal["drop", "next_best"] = field(
        "drop",
        "What becomes of them.",
        when=_LIMITED,
        options={"drop": "They are dropped.", "next_best": "They are offered to the token's next-best expert that has room."},
    )
    padded: bool = field(False, "Run every expert over exactly its capacity, zeros included (GShard, Switch); the result is the same.", when=_LIMITED)
