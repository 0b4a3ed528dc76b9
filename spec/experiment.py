"""The experiment a person describes: the one definition behind the form, YAML, REST, CLI and OpenAPI.

Every field carries its range, its help text and, where it has one, its unit (in `json_schema_extra`). Anything that
is not a field is refused. Sizes are counted by `spec.accounting`; what the trainer can run is told by `spec.trainable`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from spec.text import Name, Text


class Part(BaseModel):
    """A closed, immutable piece of a spec: unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def field(default: Any, help: str, *, unit: str | None = None, **limits: Any) -> Any:
    """A field with its help text, unit and limits, in the form that the page and OpenAPI read."""
    extra: dict[str, JsonValue] | None = {"unit": unit} if unit else None
    return Field(default, description=help, json_schema_extra=extra, **limits)


# ----- attention


class AttentionExperts(Part):
    """Query and output projections that a token is routed to; keys and values are shared (ModuleFormer, JetMoE)."""

    n_experts: int = field(8, "Pairs of query and output projections, each with all heads.", ge=1, le=4096, unit="experts")
    top_k: int = field(2, "Pairs that each token uses.", ge=1, le=4096, unit="experts")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} > n_experts {self.n_experts}")
        return self


class GroupedQueryAttention(Part):
    """Multi-head attention whose key and value heads may be shared (Ainslie 2023)."""

    kind: Literal["gqa"] = "gqa"
    n_heads: int = field(4, "Query heads.", ge=1, le=1024, unit="heads")
    n_kv_heads: int = field(4, "Key and value heads; a divisor of the query heads.", ge=1, le=1024, unit="heads")
    head_dim: int | None = field(None, "Width of one head; empty means d_model / n_heads.", ge=2, le=1024, unit="dimensions")
    bias: bool = field(False, "Bias on the query, key and value projections.")
    output_bias: bool = field(False, "Bias on the output projection.")
    qk_norm: Literal["none", "head", "full"] = field("none", "Normalise queries and keys: per head (Qwen3) or over the full projection (OLMoE).")
    sinks: bool = field(False, "A learned logit per head that takes attention away from the tokens (gpt-oss).")
    sliding_window: int | None = field(
        None, "Last tokens that a windowed layer attends to; empty means all, in every layer.", ge=1, le=1_048_576, unit="tokens"
    )
    full_every: int = field(2, "With a sliding window, every n-th layer still attends to all tokens (gpt-oss: 2).", ge=1, le=10_000, unit="layers")
    experts: AttentionExperts | None = Field(None, description="Route tokens among query and output projections; null means one projection for all.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        return self


class LatentAttention(Part):
    """Multi-head latent attention: keys and values from a low-rank latent, RoPE decoupled (DeepSeek-V2, section 2.1)."""

    kind: Literal["mla"] = "mla"
    n_heads: int = field(4, "Heads.", ge=1, le=1024, unit="heads")
    q_lora_rank: int = field(0, "Rank of the query compression; 0 means none.", ge=0, le=65536, unit="dimensions")
    kv_lora_rank: int = field(64, "Rank of the key-value latent, which is all that a cache must hold.", ge=1, le=65536, unit="dimensions")
    qk_nope_head_dim: int = field(32, "Per-head dimensions without rotary position.", ge=1, le=1024, unit="dimensions")
    qk_rope_head_dim: int = field(16, "Per-head dimensions that carry rotary position; even.", ge=2, le=1024, multiple_of=2, unit="dimensions")
    v_head_dim: int = field(32, "Per-head value dimensions.", ge=1, le=1024, unit="dimensions")


Attention = Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]


# ----- routing

RouterKind = Literal["softmax_topk", "topk_softmax", "sigmoid_topk", "switch"]


class Router(Part):
    """How a token chooses its experts. Scores are float32 unless `dtype` says otherwise."""

    kind: RouterKind = field(
        "topk_softmax",
        "softmax_topk: softmax over all experts, keep k (OLMoE, Qwen). topk_softmax: softmax over the k kept (Mixtral). "
        "sigmoid_topk: sigmoid scores, normalised over the k kept (DeepSeek-V3). switch: top-1 with input jitter (Switch).",
    )
    renormalise: bool = field(False, "softmax_topk only: divide the k kept gates by their sum (Qwen3).")
    scale: float = field(1.0, "Factor on every gate (DeepSeek-V3: 2.5).", gt=0, le=1000)
    jitter: float = field(0.0, "In training the router's input is multiplied by U(1-e, 1+e) (Switch: 0.01).", ge=0, lt=1)
    n_groups: int = field(1, "Expert groups for group-limited routing; 1 means unlimited.", ge=1, le=4096, unit="groups")
    top_groups: int = field(1, "Groups that a token may choose from.", ge=1, le=4096, unit="groups")
    group_score: Literal["max", "top2_sum"] = field("top2_sum", "A group's score: its best expert (DeepSeek-V2) or its best two (V3).")
    init_std: float = field(0.02, "Standard deviation of the router's initial weights.", gt=0, le=10)
    bias: bool = field(False, "A learned bias on the router's logits (gpt-oss).")
    dtype: Literal["float32", "bfloat16"] = field("float32", "Arithmetic of the router; bfloat16 shows what breaks.")

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.top_groups > self.n_groups:
            raise ValueError(f"top_groups {self.top_groups} > n_groups {self.n_groups}")
        return self


class SwitchAux(Part):
    """a * E * sum_i f_i P_i over the micro-batch (Fedus 2022, eq. 4-6; for k > 1, f_i = n_i / (k T))."""

    kind: Literal["switch_aux"] = "switch_aux"
    coefficient: float = field(0.01, "Weight of the term in the loss.", ge=0, le=100)


class SequenceAux(Part):
    """The same product within each sequence, on scores normalised to sum to one (DeepSeek-V3, eq. 17-20)."""

    kind: Literal["sequence_aux"] = "sequence_aux"
    coefficient: float = field(1e-4, "Weight of the term in the loss.", ge=0, le=100)


class ZLoss(Part):
    """b * mean(logsumexp(logits)^2) (Zoph 2022, eq. 5)."""

    kind: Literal["z_loss"] = "z_loss"
    coefficient: float = field(1e-3, "Weight of the term in the loss.", ge=0, le=100)


class LossFreeBias(Part):
    """Experts are selected by score + b and weighed by score; b_i += u * sign(mean(c) - c_i) (Wang 2024)."""

    kind: Literal["loss_free_bias"] = "loss_free_bias"
    update_rate: float = field(1e-3, "u: the change of an expert's bias in one optimiser step.", gt=0, le=1)


BalanceTerm = Annotated[SwitchAux | SequenceAux | ZLoss | LossFreeBias, Field(discriminator="kind")]


def _default_balance() -> list[BalanceTerm]:
    return [SwitchAux()]


class Capacity(Part):
    """How many tokens one expert may take in a batch."""

    kind: Literal["dropless", "factor"] = field("dropless", "dropless: no limit. factor: at most ceil(factor * k * T / E) tokens per expert.")
    factor: float = field(1.25, "Capacity factor in training.", gt=0, le=1000)
    eval_factor: float = field(2.0, "Capacity factor in evaluation.", gt=0, le=1000)
    drop: Literal["position", "probability"] = field(
        "position", "Which assignments an overfull expert drops: the last in the batch, or those with the lowest gate."
    )


Activation = Literal["swiglu", "geglu", "relu", "gelu"]


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
    shared_gate: bool = field(False, "Multiply the shared experts' output by a sigmoid gate (Qwen1.5-MoE).")
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
        if router.kind == "switch" and self.top_k != 1:
            raise ValueError(f"router.kind switch takes top_k 1, not {self.top_k}")
        if router.renormalise and router.kind != "softmax_topk":
            raise ValueError(f"router.renormalise is for softmax_topk; {router.kind} fixes its own normalisation")
        kinds = [term.kind for term in self.balance]
        if len(set(kinds)) < len(kinds):
            raise ValueError("balance lists the same term twice")
        return self

    @property
    def shared_width(self) -> int:
        """Hidden width of one shared expert, in dimensions."""
        return self.d_expert if self.d_shared is None else self.d_shared


# ----- the model


class Model(Part):
    """A transformer whose feed-forward layers are dense or Mixture-of-Experts."""

    n_layers: int = field(4, "Decoder layers.", ge=1, le=1_000_000, unit="layers")
    encoder_layers: int = field(0, "Encoder layers of an encoder-decoder model; 0 for decoder-only.", ge=0, le=10_000, unit="layers")
    d_model: int = field(128, "Width of the residual stream.", ge=8, le=1_048_576, unit="dimensions")
    vocab_size: int = field(264, "Rows of the embedding; the byte tokenizer needs 257.", ge=2, le=10_000_000, unit="tokens")
    tie_embeddings: bool = field(True, "Input and output embeddings are one matrix.")
    attention: Attention = GroupedQueryAttention()
    d_ff: int = field(512, "Hidden width of the dense feed-forward layers.", ge=1, le=1_048_576, unit="dimensions")
    activation: Activation = field("swiglu", "Feed-forward activation; swiglu and geglu have three matrices, relu and gelu two.")
    norm: Literal["rmsnorm", "layernorm"] = field("rmsnorm", "Normalisation before each block and at the end.")
    norm_bias: bool = field(False, "layernorm only: a bias beside the weight.")
    sandwich_norm: bool = field(False, "Normalise after each block too, before it is added to the residual stream (Grok-1).")
    norm_eps: float = field(1e-5, "Added to the variance.", gt=0, le=0.1)
    position: Literal["rope", "t5_relative"] = field("rope", "Rotary positions, or T5's relative position buckets.")
    rope_theta: float = field(10_000.0, "Base of the rotary frequencies.", gt=1, le=1e9)
    lm_head_bias: bool = field(False, "Bias on the output projection.")
    dropout: float = field(0.0, "Dropout on the attention and feed-forward outputs.", ge=0, lt=1)
    init_std: float = field(0.02, "Standard deviation of the initial weights.", gt=0, le=1)
    moe: Moe | None = Field(default_factory=Moe, description="The MoE layers; null makes every layer dense.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        attention = self.attention
        if attention.kind == "gqa":
            if attention.head_dim is None and self.d_model % attention.n_heads:
                raise ValueError(f"attention.n_heads {attention.n_heads} does not divide d_model {self.d_model}; set attention.head_dim")
            if self.position == "rope" and self.head_dim % 2:
                raise ValueError(f"attention.head_dim {self.head_dim} is odd; rotary positions need pairs")
        if self.norm_bias and self.norm != "layernorm":
            raise ValueError("norm_bias is for norm layernorm")
        if self.moe is not None and not self.moe_layers():
            raise ValueError(
                f"moe.first_k_dense {self.moe.first_k_dense} and moe.every {self.moe.every} leave no MoE layer among n_layers {self.n_layers}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head (values, for latent attention), in dimensions."""
        if self.attention.kind == "mla":
            return self.attention.v_head_dim
        return self.attention.head_dim or self.d_model // self.attention.n_heads

    @property
    def gated(self) -> bool:
        """Whether a feed-forward layer has three matrices (gate, up, down) rather than two."""
        return self.activation in ("swiglu", "geglu")

    def moe_layers(self, n_layers: int | None = None) -> range:
        """Indices (from 0) of the decoder layers that are MoE: every `moe.every`-th after the dense start."""
        total = self.n_layers if n_layers is None else n_layers
        if self.moe is None:
            return range(0)
        return range(self.moe.first_k_dense + self.moe.every - 1, total, self.moe.every)


# ----- data, optimiser and the rest

Domain = Literal["code", "prose", "tables"]


def _all_domains() -> list[Domain]:
    return ["code", "prose", "tables"]


class Data(Part):
    """What the model reads."""

    source: Literal["stdlib", "files"] = field(
        "stdlib", "stdlib: the Python standard library's own source and documentation. files: your text or JSON-lines files."
    )
    domains: list[Domain] = Field(default_factory=_all_domains, min_length=1, max_length=3, description="Parts of the stdlib corpus to read.")
    paths: list[Text] = Field(
        default_factory=list,
        max_length=1000,
        description="Files or directories on the worker (.txt, .md, .py, .jsonl); with source files. Each is a domain of its own.",
    )
    text_field: Name = Field("text", description="The key that holds the text in JSON lines.")
    tokenizer: Literal["byte"] = field("byte", "byte: one token per byte and one that separates documents.")
    seq_len: int = field(256, "Tokens in one training sequence.", ge=8, le=1_048_576, unit="tokens")
    validation_share: float = field(0.05, "Share of the documents that is held out.", gt=0, le=0.5)

    @model_validator(mode="after")
    def _paths_where_needed(self) -> Self:
        if (self.source == "files") != bool(self.paths):
            raise ValueError("paths go with source files, and source files needs paths")
        if len(set(self.domains)) < len(self.domains):
            raise ValueError("domains lists one twice")
        return self


class Optimizer(Part):
    """AdamW (Loshchilov 2019) with linear warm-up, then a cosine down to a share of the peak."""

    lr: float = field(3e-3, "Peak learning rate.", gt=0, le=10)
    router_lr_factor: float = field(1.0, "Factor on the routers' learning rate.", ge=0, le=1000)
    beta1: float = field(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta2: float = field(0.95, "Decay of the second moment.", ge=0, lt=1)
    eps: float = field(1e-8, "Added to the root of the second moment.", gt=0, le=1)
    weight_decay: float = field(0.1, "Decoupled weight decay on matrices; not on norms, biases and embeddings.", ge=0, le=10)
    grad_clip: float = field(1.0, "Largest global gradient norm; 0 means no clipping.", ge=0, le=1e6)
    schedule: Literal["cosine", "constant"] = field("cosine", "Learning rate after the warm-up.")
    warmup_steps: int = field(20, "Steps of linear warm-up.", ge=0, le=10_000_000, unit="steps")
    min_lr_ratio: float = field(0.1, "Last learning rate of the cosine, as a share of the peak.", ge=0, le=1)


class Training(Part):
    """How long, how much at a time, and what is kept."""

    steps: int = field(300, "Optimiser steps.", ge=1, le=100_000_000, unit="steps")
    batch_size: int = field(8, "Sequences in one optimiser step, over all devices.", ge=1, le=1_048_576, unit="sequences")
    grad_accumulation: int = field(1, "Micro-batches that make up one step.", ge=1, le=65536, unit="micro-batches")
    precision: Literal["float32", "bfloat16"] = field("float32", "Arithmetic of the matrix products; weights and router stay float32.")
    eval_every: int = field(100, "Steps between validations; 0 validates only at the end.", ge=0, le=100_000_000, unit="steps")
    eval_batches: int = field(8, "Batches of one validation, per domain.", ge=1, le=100_000, unit="batches")
    checkpoint_every: int = field(100, "Steps between checkpoints; 0 saves only at the end and on request.", ge=0, le=100_000_000, unit="steps")
    keep_checkpoints: int = field(3, "Newest checkpoints that are kept.", ge=1, le=1000, unit="checkpoints")
    activation_recompute: bool = field(False, "Recompute each layer's activations in the backward pass to save memory.")

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"grad_accumulation {self.grad_accumulation} does not divide batch_size {self.batch_size}")
        return self


class Parallel(Part):
    """Processes that share one run; one process per device."""

    expert: int = field(1, "Ranks that share one copy of the experts.", ge=1, le=4096, unit="ranks")
    data: int = field(1, "Replicas, each with its own part of the batch.", ge=1, le=4096, unit="ranks")
    device: Literal["auto", "cpu", "cuda"] = field("auto", "Where it runs; auto takes a CUDA device where the worker has one.")
    threads: int = field(0, "CPU threads per rank; 0 leaves it to the worker.", ge=0, le=1024, unit="threads")

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.expert * self.data


class Telemetry(Part):
    """What the run reports of itself. Counts are kept at full resolution whatever the page shows."""

    every: int = field(1, "Steps between reports.", ge=1, le=10_000, unit="steps")
    router_prob: bool = field(True, "Report each expert's mean router probability beside its token count.")
    spike_window: int = field(64, "Losses before a step that its loss is judged against.", ge=8, le=10_000, unit="steps")
    spike_threshold: float = field(6.0, "A spike lies this many robust deviations (1.4826 MAD) above the window's median.", gt=0, le=1000)


class ExperimentSpec(Part):
    """A Mixture-of-Experts experiment, complete: the same spec and seed give the same run."""

    name: Name = Field("untitled", description="What to call it.")
    seed: int = field(0, "Seed of the weights, the data order and the routing noise.", ge=0, le=2**31 - 1)
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.data.tokenizer == "byte" and self.model.vocab_size < 257:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} < 257, which data.tokenizer byte needs")
        if self.model.moe is None and self.parallel.expert > 1:
            raise ValueError(f"parallel.expert {self.parallel.expert} needs a model with MoE layers")
        if self.model.moe is not None and self.model.moe.n_experts % self.parallel.expert:
            raise ValueError(f"parallel.expert {self.parallel.expert} does not divide model.moe.n_experts {self.model.moe.n_experts}")
        micro = self.training.batch_size // self.training.grad_accumulation
        if micro % self.parallel.world_size:
            raise ValueError(f"parallel.expert x parallel.data = {self.parallel.world_size} ranks do not divide a micro-batch of {micro} sequences")
        return self
