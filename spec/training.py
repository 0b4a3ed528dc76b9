"""How a model is trained, as a person describes it: optimiser, length, processes, reports."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from spec.part import Part, field


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
    precision: Literal["float32", "tf32", "bfloat16"] = field(
        "float32",
        "Arithmetic of the matrix products. float32: IEEE; tf32: float32 with 10 bits of mantissa in products on a CUDA device (routers' too), and "
        "the same as float32 elsewhere; bfloat16: with weights, moments and routers in float32.",
    )
    eval_every: int = field(100, "Steps between validations; 0 validates only at the end.", ge=0, le=100_000_000, unit="steps")
    eval_batches: int = field(8, "Batches of one validation, per domain.", ge=1, le=100_000, unit="batches")
    checkpoint_every: int = field(100, "Steps between checkpoints; 0 saves only at the end and on request.", ge=0, le=100_000_000, unit="steps")
    keep_checkpoints: int = field(3, "Newest checkpoints that are kept.", ge=1, le=1000, unit="checkpoints")
    train: Literal["all", "all_but_moe", "only_moe", "only_router"] = field(
        "all",
        "Which parameters are trained; the others stay as the start has them, without gradient and optimiser state (Zoph 2022, section 6). "
        "only_moe: routers, experts and shared experts.",
    )
    activation_recompute: bool = field(False, "Recompute each layer's activations in the backward pass to save memory.")
    compile: bool = field(
        False,
        "Run the layers through torch.compile: faster steps after a slower start. Needs Triton and a C compiler on CUDA, a C++ compiler on a CPU.",
    )

    @property
    def product_bytes(self) -> int:
        """Bytes of one number in the matrix products."""
        return 2 if self.precision == "bfloat16" else 4

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"grad_accumulation {self.grad_accumulation} does not divide batch_size {self.batch_size}")
        return self


class Parallel(Part):
    """Processes that share one run; one process per device."""

    expert: int = field(1, "Ranks that share one copy of the experts.", ge=1, le=4096, unit="ranks")
    data: int = field(1, "Replicas, each with its own part of the batch.", ge=1, le=4096, unit="ranks")
    nodes: int = field(1, "Hosts that share the run; its ranks are divided evenly over them.", ge=1, le=256, unit="hosts")
    shard: bool = field(
        False,
        "Shard the weights that are not experts', their gradients and moments over all ranks (FSDP2); a layer's are whole only while it runs, in the "
        "training's precision. Embeddings and output projection are whole for a micro-batch; in bfloat16 routers, norms and biases always. With "
        "grad_accumulation gradients are whole until the step's last micro-batch.",
    )
    device: Literal["auto", "cpu", "cuda"] = field("auto", "Where it runs; auto takes a CUDA device where the worker has one.")
    overlap: bool = field(True, "Run shared experts while tokens travel between the ranks that hold the routed ones; the numbers are the same.")
    threads: int = field(0, "CPU threads per rank; 0 leaves it to the worker.", ge=0, le=1024, unit="threads")

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.expert * self.data

    @model_validator(mode="after")
    def _nodes_divide(self) -> Self:
        if self.world_size % self.nodes:
            raise ValueError(f"nodes {self.nodes} does not divide the {self.world_size} ranks of parallel.expert x parallel.data")
        return self


class Telemetry(Part):
    """What the run reports of itself. Counts are kept at full resolution whatever the page shows."""

    every: int = field(1, "Steps between reports.", ge=1, le=10_000, unit="steps")
    router_prob: bool = field(True, "Report each expert's mean router probability beside its token count.")
    specialisation: bool = field(True, "Count at each validation which classes of token and which domains each expert takes.")
    probe_batch: bool = field(
        True, "Measure at each validation how far a sequence's logits depend on what shares its batch: 0 without dropping and expert choice."
    )
    phases_every: int = field(
        10,
        "Steps between samples of where a step's time goes: router, dispatch, experts, communication, waiting and so on, forward and backward; "
        "rounded up to reported steps, 0 for never.",
        ge=0,
        le=1_000_000,
        unit="steps",
    )
    spike_window: int = field(64, "Losses before a step that its loss is judged against.", ge=8, le=10_000, unit="steps")
    spike_threshold: float = field(6.0, "A spike lies this many robust deviations (1.4826 MAD) above the window's median.", gt=0, le=1000)

    @property
    def sample_steps(self) -> int:
        """Steps between samples: `phases_every`, rounded up to a multiple of `every`; 0 for never."""
        return -(-self.phases_every // self.every) * self.every

    def sampled(self, step: int) -> bool:
        """Whether the parts of this step are timed."""
        return bool(self.sample_steps) and step % self.sample_steps == 0
