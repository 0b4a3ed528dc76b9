"""The part of a step that is mathematics: forward, backward, reduction over ranks, optimiser, balancing.

Everything random in a step is a function of (seed, step, rank): the data order and the noise of dropout and routers.
So a run that was interrupted anywhere goes on exactly as it would have.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.laps import Laps
from moe.model import Transformer, build_model
from moe.routing import RoutingStats
from moe.train import reading, sharded, telemetry
from moe.train.batches import Batches
from moe.train.clock import PhaseClock
from moe.train.compiler import check_compiler
from moe.train.freeze import freeze
from moe.train.hash_tables import fill_tables
from moe.train.loader import Loader
from moe.train.optimizer import AdamW
from moe.train.ranks import Ranks
from moe.train.reading import Reading
from moe.train.schedule import learning_rate
from moe.train.stop import SpecRefused
from spec.experiment import ExperimentSpec


@dataclass(frozen=True)
class Lesson:
    """A step that was made. `figures` are over all ranks; `phase_ms` is float32[R, phases]; `sample` is of a sampled step."""

    step: int
    figures: telemetry.Step
    rate: float
    seconds: float
    phase_ms: NDArray[np.float32]
    sample: telemetry.Sample | None = None


@dataclass(frozen=True)
class Made:
    """A step that was handed to the device, and what its figures will be read from."""

    step: int
    rate: float
    started: float
    reading: Reading
    parts: dict[str, Tensor]
    clock: PhaseClock


class Learner:
    """A model and its optimiser."""

    def __init__(self, spec: ExperimentSpec, batches: Batches, ranks: Ranks) -> None:
        """Fresh weights from the spec's seed, the same on every rank."""
        self.spec, self.batches, self.ranks = spec, batches, ranks
        self.dtype = torch.bfloat16 if spec.training.precision == "bfloat16" else torch.float32  # of the products
        if batches.vocabulary.size > spec.model.vocab_size:
            where = {"file": "data.tokenizer_path"}.get(spec.data.tokenizer, "data.tokenizer")
            raise SpecRefused("model.vocab_size", f"{spec.model.vocab_size} is less than the {batches.vocabulary.size} tokens of {where}")
        if ranks.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if spec.training.precision == "tf32" else "highest")
        torch.manual_seed(spec.seed)
        self.model = build_model(spec.model, recompute=spec.training.activation_recompute, mesh=ranks.mesh).to(ranks.device)
        fill_tables(self.model, batches.domains, spec.seed)
        self.model.train()
        freeze(self.model, spec.training.train)
        if ranks.shard:
            sharded.shard(self.model, ranks.size, ranks.device, self.dtype)
        if spec.training.compile:
            check_compiler(ranks.device)
            self.model.compile_blocks()
        self.optimizer = AdamW(self.model, spec.optimizer, ranks.mesh)
        self.reading = reading.of_device(ranks.device)
        self._loader = Loader(batches, spec.training.grad_accumulation, ranks, ahead=ranks.device.type == "cuda")
        self._told = 0.0

    @property
    def late(self) -> bool:
        """Whether a step's figures are better read when the next one has been handed to the device."""
        return self.reading.late

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 matrix products, where the spec asks for them."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.ranks.device.type, self.dtype)

    def train_step(self, step: int, wishes: Callable[[], tuple[bool, bool]]) -> Lesson:
        """Makes optimiser step `step`, and waits for what it tells."""
        return self.lesson(self.make_step(step, wishes))

    def make_step(self, step: int, wishes: Callable[[], tuple[bool, bool]]) -> Made:
        """Hands optimiser step `step` to the device, which on return may be at it still (`late`).

        `wishes`, asked at its end: whether this rank wants to stop, and to save; the figures tell all ranks.
        """
        started = time.perf_counter()
        rate = learning_rate(self.spec.optimizer, step, self.spec.training.steps)
        lm_loss, balance_loss, grad_norm, stats, mtp_loss = self.learn(step, rate)
        parts = telemetry.step_parts(lm_loss, balance_loss, grad_norm, stats, self.model.expert_bias(), wishes(), mtp_loss)
        rows = self.ranks.gather(telemetry.pack(parts))
        if stats is not None:
            self._update_balance(stats, rows, parts)
        return Made(step, rate, started, self.reading(rows), parts, self._clock)

    def lesson(self, made: Made) -> Lesson:
        """What a step tells, once the device has made it. Steps are told in the order in which they were made; collective."""
        figures = telemetry.Step.over_ranks(telemetry.unpack(made.reading.array(), made.parts))
        now = time.perf_counter()
        seconds = now - max(made.started, self._told)  # of steps that were made before the last one was told: from its end
        self._told = now
        return Lesson(made.step, figures, made.rate, seconds, self._phases(made.clock), self._sample(made.clock))

    def learn(self, step: int, rate: float) -> tuple[Tensor, Tensor, Tensor, RoutingStats | None, Tensor | None]:
        """The step itself; this rank's mean losses, the gradient norm, the routing statistics and the extra predictions' loss, on the device."""
        sampled = self.spec.telemetry.sampled(step) and not self.model.is_compiled  # a clock would break the graphs
        self._clock = PhaseClock(telemetry.PHASES, self.ranks.device, Laps(self.ranks.device) if sampled else None)
        with ExitStack() as step_long:
            lm_loss, balance_loss, stats, mtp_loss = self._forward_backward(step, step_long)
        if self._clock.laps is not None:
            self._clock.laps.mark("other")  # gradients are joined for their reduction
        sharded.average_gradients(self.optimizer.parameters, self.ranks.size, self.ranks.mesh, self._clock.laps)
        self._clock.mark("reduce")
        grad_norm = self.optimizer.clip(self.spec.optimizer.grad_clip)
        self.optimizer.step(rate)
        self.optimizer.zero_grad()
        self._clock.mark("optimizer")
        return lm_loss, balance_loss, grad_norm, stats, mtp_loss

    @property
    def _takes_casts(self) -> bool:
        """Whether experts take matrices that are cast already: on a CPU compiled ones cast for themselves, but for those beside an exchange."""
        return self.ranks.device.type != "cpu" or not self.model.is_compiled or self.ranks.mesh is not None

    def _forward_backward(self, step: int, step_long: ExitStack) -> tuple[Tensor, Tensor, RoutingStats | None, Tensor | None]:
        """Leaves the gradients of the step's mean loss; returns mean losses and statistics of its micro-batches, detached.

        What all of them share goes when `step_long` is left.
        """
        micros = self.spec.training.grad_accumulation
        torch.manual_seed(_noise_seed(self.spec.seed, step, self.ranks.rank))
        self.model.begin_step()
        lm_losses, balance_losses, stats, mtp_losses = [], [], [], []
        for micro, (tokens_BS, targets_BS) in enumerate(self._loader.micro_batches(step)):
            if self.ranks.shard:
                sharded.reduce_in_backward(self.model, wanted=micro == micros - 1)
            self._clock.mark("data")
            if micro == 0 and self._takes_casts:
                step_long.enter_context(self.model.experts_cast(self.dtype, self._clock.laps))
            with self.autocast():
                output = self.model(tokens_BS, targets_BS, self.batches.documents(tokens_BS), laps=self._clock.laps)
            self._clock.mark("forward")
            loss = output.lm_loss + output.balance_loss
            if output.mtp_loss is not None:
                loss = loss + output.mtp_loss
                mtp_losses.append(output.mtp_loss.detach())
            (loss / micros).backward()
            self._clock.mark("backward")
            lm_losses.append(output.lm_loss.detach())
            balance_losses.append(output.balance_loss.detach())
            if output.stats is not None:
                stats.append(output.stats)
        merged, ahead = RoutingStats.merged(stats) if stats else None, torch.stack(mtp_losses).mean() if mtp_losses else None
        return torch.stack(lm_losses).mean(), torch.stack(balance_losses).mean(), merged, ahead

    def _update_balance(self, stats: RoutingStats, rows: Tensor, parts: dict[str, Tensor]) -> None:
        """The loss-free biases follow the counts of all ranks, which `rows` holds on the device, unless the MoE layers are frozen."""
        if self.spec.training.train == "all_but_moe":
            return
        if self.ranks.size > 1:
            stats = dataclasses.replace(stats, expert_tokens_LE=telemetry.total(rows, parts, "expert_tokens"))
        self.model.update_balance(stats)

    def _phases(self, clock: PhaseClock) -> NDArray[np.float32]:
        """Of all ranks, by way of their hosts: the devices are at the next step already."""
        return self.ranks.gather(torch.tensor(clock.milliseconds(), dtype=torch.float32)).numpy()

    def close(self) -> None:
        """Ends what runs beside the learner."""
        self._loader.close()

    def _sample(self, clock: PhaseClock) -> telemetry.Sample | None:
        laps = clock.laps
        if laps is None:
            return None
        own = torch.tensor([*laps.milliseconds().flatten(), laps.sent_bytes], dtype=torch.float32)
        return telemetry.Sample.over_ranks(self.ranks.gather(own).numpy(), routed=self.ranks.mesh is not None)

    # ----- state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file: on rank 0, whole. Collective where ranks hold parts."""
        mesh = self.ranks.mesh
        return {"model": sharded.whole(self.model.state_dict(), mesh), "optimizer": sharded.whole(self.optimizer.tensors(), mesh)}

    @contextmanager
    def whole_model(self) -> Iterator[Transformer]:
        """The model with all its weights, to be filled; where this rank holds a part of them, it takes its own at the end."""
        if not self.ranks.together:
            yield self.model
            return
        torch.manual_seed(self.spec.seed)  # what the start does not fill, routers above all, must be the same on every rank
        whole = build_model(self.spec.model)
        fill_tables(whole, self.batches.domains, self.spec.seed)
        yield whole
        self._load(whole.state_dict())

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Puts back what `tensors` returned. Raises SpecRefused if they are of another model."""
        try:
            self._load(tensors["model"])
            self.optimizer.load(sharded.own(tensors["optimizer"], self.optimizer.tensors(), self.ranks.mesh))
        except (RuntimeError, KeyError) as error:
            raise SpecRefused("model", f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}") from error

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(sharded.own(tensors, self.model.state_dict(), self.ranks.mesh))


def _noise_seed(seed: int, step: int, rank: int) -> int:
    """One generator seed for each step of each rank, far from the next one's in every bit (SplitMix64's finaliser)."""
    z = (seed + 0x9E3779B97F4A7C15 * (step * 4096 + rank + 1)) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63
