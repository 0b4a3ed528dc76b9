"""The model, as a person describes it: a transformer whose feed-forward layers are dense or Mixture-of-Experts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from spec.attention import Attention, GroupedQueryAttention, RopeScaling
from spec.moe import GATED, Activation, Moe
from spec.part import Part, field


class Model(Part):
    """A transformer whose feed-forward layers are dense or Mixture-of-Experts."""

    n_layers: int = field(4, "Decoder layers.", ge=1, le=1_000_000, unit="layers")
    encoder_layers: int = field(0, "Encoder layers of an encoder-decoder model; 0 for decoder-only.", ge=0, le=10_000, unit="layers")
    d_model: int = field(128, "Width of the residual stream.", ge=8, le=1_048_576, unit="dimensions")
    vocab_size: int = field(264, "Rows of the embedding; the byte tokenizer needs 257.", ge=2, le=10_000_000, unit="tokens")
    tie_embeddings: bool = field(True, "Input and output embeddings are one matrix.")
    attention: Attention = GroupedQueryAttention()
    d_ff: int = field(512, "Hidden width of the dense feed-forward layers.", ge=1, le=1_048_576, unit="dimensions")
    activation: Activation = field("swiglu", "Feed-forward activation; swiglu, geglu and swiglu_clamped (gpt-oss) have three matrices, others two.")
    norm: Literal["rmsnorm", "layernorm"] = field("rmsnorm", "Normalisation before each block and at the end.")
    norm_bias: bool = field(False, "layernorm only: a bias beside the weight.")
    sandwich_norm: bool = field(False, "Normalise after each block too, before it is added to the residual stream (Grok-1).")
    norm_eps: float = field(1e-5, "Added to the variance.", gt=0, le=0.1)
    final_norm_eps: float | None = field(None, "The same in the norm at the end; empty means norm_eps (JetMoE: 1e-5, beside 1e-6).", gt=0, le=0.1)
    position: Literal["rope", "t5_relative"] = field("rope", "Rotary positions, or T5's relative position buckets.")
    rope_theta: float = field(10_000.0, "Base of the rotary frequencies.", gt=1, le=1e9)
    rope_scaling: RopeScaling | None = Field(None, description="How rotary positions reach beyond the length that the model was trained at.")
    lm_head_bias: bool = field(False, "Bias on the output projection.")
    dropout: float = field(0.0, "Dropout on the attention and feed-forward outputs.", ge=0, lt=1)
    init_std: float = field(0.02, "Standard deviation of the initial weights.", gt=0, le=1)
    mtp_depth: int = field(0, "Extra blocks that each predict one token further ahead (multi-token prediction, V3: 1).", ge=0, le=16, unit="blocks")
    mtp_weight: float = field(0.3, "Weight of the mean of their losses in the loss (DeepSeek-V3: 0.3, later 0.1).", gt=0, le=100)
    moe: Moe | None = Field(default_factory=Moe, description="The MoE layers; null makes every layer dense.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        attention = self.attention
        if attention.kind == "gqa":
            if attention.head_dim is None and self.d_model % attention.n_heads:
                raise ValueError(f"attention.n_heads {attention.n_heads} does not divide d_model {self.d_model}; set attention.head_dim")
            if self.position == "rope" and self.head_dim % 2:
                raise ValueError(f"attention.head_dim {self.head_dim} is odd; rotary positions need pairs")
        if attention.kind == "lightning" and self.encoder_layers:
            raise ValueError("attention.kind lightning is for decoder-only models: encoder_layers must be 0")
        if self.rope_scaling is not None:
            self._rope_fits(self.rope_scaling)
        if self.norm_bias and self.norm != "layernorm":
            raise ValueError("norm_bias is for norm layernorm")
        if self.moe is not None and not self.moe_layers():
            raise ValueError(
                f"moe.first_k_dense {self.moe.first_k_dense} and moe.every {self.moe.every} leave no MoE layer among n_layers {self.n_layers}"
            )
        return self

    def _rope_fits(self, scaling: RopeScaling) -> None:
        if self.position != "rope":
            raise ValueError(f"rope_scaling is for position rope, not {self.position}")
        width = self.attention.qk_rope_head_dim if self.attention.kind == "mla" else self.head_dim
        if scaling.kind == "longrope" and len(scaling.short_factor) != width // 2:
            raise ValueError(f"rope_scaling.short_factor has {len(scaling.short_factor)} numbers; {width} rotated dimensions need {width // 2}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head (values, for latent attention), in dimensions."""
        if self.attention.kind == "mla":
            return self.attention.v_head_dim
        return self.attention.head_dim or self.d_model // self.attention.n_heads

    @property
    def gated(self) -> bool:
        """Whether a feed-forward layer has three matrices (gate, up, down) rather than two."""
        return self.activation in GATED

    def moe_layers(self, n_layers: int | None = None) -> range:
        """Indices (from 0) of the decoder layers that are MoE: every `moe.every`-th after the dense start."""
        total = self.n_layers if n_layers is None else n_layers
        if self.moe is None:
            return range(0)
        return range(self.moe.first_k_dense + self.moe.every - 1, total, self.moe.every)
