"""The experiment a person describes: the one definition behind the form, YAML, REST, CLI and OpenAPI.

Its parts have modules of their own: attention, routing, balance, moe, model, data, start, training. Every field carries its
range, its help text and, where it has one, its unit (in `json_schema_extra`). Anything that is not a field is refused.
Sizes are counted by `spec.accounting`; what the trainer can run is told by `spec.trainable`.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from spec.data import Data
from spec.model import Model
from spec.part import Part, field
from spec.start import Scratch, Start, Upcycle
from spec.text import Name
from spec.training import Optimizer, Parallel, Telemetry, Training


class ExperimentSpec(Part):
    """A Mixture-of-Experts experiment, complete: the same spec and seed give the same run."""

    name: Name = Field("untitled", description="What to call it.")
    seed: int = field(0, "Seed of the weights, the data order and the routing noise.", ge=0, le=2**31 - 1)
    model: Model = Model()
    start: Start = Field(Scratch(), description="Where the first weights come from: drawn anew, or those of a model that exists already.")
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    parallel: Parallel = Parallel()
    telemetry: Telemetry = Telemetry()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.data.tokenizer == "byte" and self.model.vocab_size < 257:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} < 257, which data.tokenizer byte needs")
        if self.data.tokenizer == "bpe" and self.model.vocab_size < self.data.bpe_vocab_size:
            raise ValueError(f"model.vocab_size {self.model.vocab_size} < {self.data.bpe_vocab_size}, which data.bpe_vocab_size asks for")
        if self.model.moe is None and self.parallel.expert > 1:
            raise ValueError(f"parallel.expert {self.parallel.expert} needs a model with MoE layers")
        if self.model.moe is not None and self.model.moe.n_experts % self.parallel.expert:
            raise ValueError(f"parallel.expert {self.parallel.expert} does not divide model.moe.n_experts {self.model.moe.n_experts}")
        self._devices_are_ranks()
        if self.data.seq_len <= self.model.mtp_depth:
            raise ValueError(f"data.seq_len {self.data.seq_len} must be > model.mtp_depth {self.model.mtp_depth}")
        micro = self.training.batch_size // self.training.grad_accumulation
        if micro % self.parallel.world_size:
            raise ValueError(f"parallel.expert x parallel.data = {self.parallel.world_size} ranks do not divide a micro-batch of {micro} sequences")
        self._start_fits()
        self._something_is_trained()
        return self

    def _devices_are_ranks(self) -> None:
        """Where ranks share the experts, they are the devices that routing is limited to and that terms speak of."""
        moe, ranks = self.model.moe, self.parallel.expert
        if moe is None or ranks == 1:
            return
        groups = moe.router.n_groups
        if moe.router.top_groups < groups and groups % ranks and ranks % groups:
            raise ValueError(
                f"model.moe.router.n_groups {groups} and parallel.expert {ranks} do not divide each other: "
                "the experts of a group would lie on parts of ranks"
            )
        for term in moe.balance:
            if (term.kind == "device_aux" or term.kind == "communication_aux") and term.n_devices != ranks:
                raise ValueError(
                    f"model.moe.balance {term.kind} n_devices {term.n_devices} is not parallel.expert {ranks}: "
                    "its devices are the ranks that share the experts"
                )

    def _start_fits(self) -> None:
        start, moe = self.start, self.model.moe
        if not isinstance(start, Upcycle):
            return
        if moe is None:
            raise ValueError("start.kind upcycle makes MoE layers, but model.moe is null")
        if moe.n_experts != start.granularity * (start.expand or max(1, moe.n_experts // start.granularity)):
            copies = "copies" if start.expand is None else f"start.expand {start.expand} copies"
            raise ValueError(f"start.granularity {start.granularity} slices x {copies} do not make model.moe.n_experts {moe.n_experts}")
        if moe.combine != "sum":
            raise ValueError(f"start.kind upcycle needs model.moe.combine sum, not {moe.combine}: the shared experts get a part of the dense layer")
        if moe.activation not in (None, self.model.activation):
            raise ValueError(f"start.kind upcycle copies layers with model.activation {self.model.activation} to experts with {moe.activation}")

    def _something_is_trained(self) -> None:
        train, moe = self.training.train, self.model.moe
        if moe is None and train != "all":
            raise ValueError(f"training.train {train} needs a model with MoE layers, but model.moe is null")
        if moe is not None and train == "only_router" and not moe.router.traits.learned:
            raise ValueError(f"training.train only_router: model.moe.router.kind {moe.router.kind} has nothing to learn")
