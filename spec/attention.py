"""Attention, as a person describes it: grouped-query, multi-head latent, or lightning."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spec.part import Part, field


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
    qk_norm: Literal["none", "head", "full", "l2"] = field(
        "none", "Normalise queries and keys: per head (Qwen3), over the full projection (OLMoE), or per rotated head without weights (Llama 4)."
    )
    clip_qkv: float | None = field(None, "Queries, keys and values are clamped to this magnitude (DBRX: 8).", gt=0, le=1e6)
    sinks: bool = field(False, "A learned logit per head that takes attention away from the tokens (gpt-oss).")
    sliding_window: int | None = field(
        None, "Last tokens that a windowed layer attends to; empty means all, in every layer.", ge=1, le=1_048_576, unit="tokens"
    )
    full_every: int = field(2, "With a sliding window, every n-th layer still attends to all tokens (gpt-oss: 2).", ge=1, le=10_000, unit="layers")
    chunk: int | None = field(
        None,
        "Layers with rotary positions attend within blocks of so many tokens (Llama 4: 8192); empty means all.",
        ge=1,
        le=1_048_576,
        unit="tokens",
    )
    nope_every: int = field(0, "Every n-th layer has no rotary positions and no chunks (Llama 4: 4); 0 means none.", ge=0, le=10_000, unit="layers")
    temperature_floor: int = field(
        0,
        "Layers without rotary positions scale queries by 1 + 0.1 log(floor((position + 1) / floor) + 1) (Llama 4: 8192); 0 means not.",
        ge=0,
        le=1_048_576,
        unit="tokens",
    )
    experts: AttentionExperts | None = Field(None, description="Route tokens among query and output projections; null means one projection for all.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if self.temperature_floor and not self.nope_every:
            raise ValueError("temperature_floor is for layers without rotary positions: set nope_every")
        return self

    def window_at(self, layer: int) -> int | None:
        """Last tokens that layer `layer` (from 0) attends to; None for all."""
        return self.sliding_window if (layer + 1) % self.full_every else None

    def rotates_at(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has rotary positions."""
        return not self.nope_every or (layer + 1) % self.nope_every != 0

    def chunk_at(self, layer: int) -> int | None:
        """Tokens of the blocks within which layer `layer` (from 0) attends; None for all."""
        return self.chunk if self.rotates_at(layer) else None


class LatentAttention(Part):
    """Multi-head latent attention: keys and values from a low-rank latent, RoPE decoupled (DeepSeek-V2, section 2.1)."""

    kind: Literal["mla"] = "mla"
    n_heads: int = field(4, "Heads.", ge=1, le=1024, unit="heads")
    q_lora_rank: int = field(0, "Rank of the query compression; 0 means none.", ge=0, le=65536, unit="dimensions")
    kv_lora_rank: int = field(64, "Rank of the key-value latent, which is all that a cache must hold.", ge=1, le=65536, unit="dimensions")
    qk_nope_head_dim: int = field(32, "Per-head dimensions without rotary position.", ge=1, le=1024, unit="dimensions")
    qk_rope_head_dim: int = field(16, "Per-head dimensions that carry rotary position; even.", ge=2, le=1024, multiple_of=2, unit="dimensions")
    v_head_dim: int = field(32, "Per-head value dimensions.", ge=1, le=1024, unit="dimensions")
    norm_eps: float | None = field(None, "Added to the variance in the norms of the latents; empty means the model's (DeepSeek: 1e-6).", gt=0, le=0.1)


class LightningAttention(Part):
    """Linear attention with a decaying state and a gated output, and softmax attention in every n-th layer (MiniMax-01, section 2.2); priced only."""

    kind: Literal["lightning"] = "lightning"
    n_heads: int = field(4, "Heads.", ge=1, le=1024, unit="heads")
    n_kv_heads: int = field(4, "Key and value heads of the softmax layers; a divisor of the heads.", ge=1, le=1024, unit="heads")
    head_dim: int = field(32, "Width of one head.", ge=2, le=1024, unit="dimensions")
    full_every: int = field(8, "Every n-th layer has softmax attention instead.", ge=1, le=10_000, unit="layers")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        return self

    def softmax_at(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has softmax attention."""
        return (layer + 1) % self.full_every == 0


Attention = Annotated[GroupedQueryAttention | LatentAttention | LightningAttention, Field(discriminator="kind")]


# ----- rotary positions beyond the trained length


class LinearScaling(Part):
    """Positions divided by a factor (Chen 2023)."""

    kind: Literal["linear"] = "linear"
    factor: float = field(4.0, "Longest context over the trained one.", ge=1, le=10_000)


class Llama3Scaling(Part):
    """Low frequencies slowed down, high ones kept, a ramp between (Llama 3.1)."""

    kind: Literal["llama3"] = "llama3"
    factor: float = field(8.0, "By how much the low frequencies are slowed down.", ge=1, le=10_000)
    low_freq_factor: float = field(1.0, "Below this many turns in the trained length a frequency is low.", gt=0, le=1000)
    high_freq_factor: float = field(4.0, "Above this many turns in the trained length a frequency is high.", gt=0, le=1000)
    trained_len: int = field(8192, "Context that the model was trained at.", ge=1, le=10_000_000, unit="tokens")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor} must be >= low_freq_factor {self.low_freq_factor}")
        return self


class YarnScaling(Part):
    """NTK-by-parts interpolation with a correction of the attention's temperature (Peng 2023)."""

    kind: Literal["yarn"] = "yarn"
    factor: float = field(32.0, "Longest context over the trained one.", ge=1, le=10_000)
    beta_fast: float = field(32.0, "Above this many turns in the trained length a frequency is kept.", gt=0, le=10_000)
    beta_slow: float = field(1.0, "Below this many turns in the trained length a frequency is divided by the factor.", gt=0, le=10_000)
    trained_len: int = field(4096, "Context that the model was trained at.", ge=1, le=10_000_000, unit="tokens")
    truncate: bool = field(True, "Round the ramp's ends to whole dimensions (gpt-oss: no).")
    mscale: float = field(0.0, "DeepSeek's factor on queries and keys; 0 means YaRN's own 0.1 ln(factor) + 1.", ge=0, le=100)
    mscale_all_dim: float = field(0.0, "DeepSeek's factor on the attention's scale; 0 means none.", ge=0, le=100)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must be > beta_slow {self.beta_slow}")
        return self


class LongRopeScaling(Part):
    """A divisor for every frequency, from a search (Ding 2024; Phi-3.5-MoE)."""

    kind: Literal["longrope"] = "longrope"
    short_factor: list[float] = Field(description="Divisor of each frequency within the trained length.", min_length=1, max_length=512)
    long_factor: list[float] = Field(description="Divisor of each frequency beyond it.", min_length=1, max_length=512)
    short_mscale: float = field(0.0, "Factor on cosines and sines within the trained length; 0 means the formula's.", ge=0, le=100)
    long_mscale: float = field(0.0, "Factor on cosines and sines beyond it; 0 means the formula's.", ge=0, le=100)
    trained_len: int = field(4096, "Context that the model was trained at.", ge=1, le=10_000_000, unit="tokens")
    max_len: int = field(131_072, "Longest context.", ge=1, le=10_000_000, unit="tokens")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.short_factor) != len(self.long_factor):
            raise ValueError(f"long_factor has {len(self.long_factor)} numbers, short_factor {len(self.short_factor)}")
        for name in ("short_factor", "long_factor"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive throughout")
        if self.trained_len < 2:
            raise ValueError(f"trained_len {self.trained_len} must be > 1: its logarithm is divided by")
        return self


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling, Field(discriminator="kind")]
