"""The training loop: `Training.run` makes all the steps that a checkpoint has not made already, and tells what happens.

It writes the attempt's spool and the checkpoints (docs/protocol.md, sections 1 and 2); on ranks other than the first it is silent.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.dispatch import implementations, is_aligned
from moe import balance
from moe.attention import is_masked
from moe.router_kinds import takes_highest
from moe.train import checkpoint, handing, telemetry
from moe.train.journal import Journal, duration
from moe.train.learner import Learner, Lesson, Made
from moe.train.spikes import SpikeDetector
from moe.train.stop import DiskFull, NotFinite, Requests, Stopped
from moe.train.validation import validate
from spec import accounting, events
from spec.experiment import ExperimentSpec

ROUTER_MEMORY_STEPS = 16  # What the router did "before" a spike is its mean over this many steps.
RESERVE = 3  # A run does not start where fewer of its checkpoints than this would fit on the disk.


@dataclass
class Position:
    """How far the run has come: with the tensors, all that a checkpoint holds."""

    step: int = 0
    loss: float = math.nan
    validated_step: int = 0
    validation_loss: float = math.nan


class Training:
    """A learner on its way. `out` is the run's directory."""

    def __init__(self, spec: ExperimentSpec, learner: Learner, out: Path, attempt: int, requests: Requests) -> None:
        """Raises DiskFull where the run's checkpoints would not fit."""
        self.spec, self.learner, self.attempt, self.requests = spec, learner, attempt, requests
        self.ranks = learner.ranks
        self.position = Position()
        self._directory = out / "checkpoints"
        out.mkdir(parents=True, exist_ok=True)
        _check_disk(out, learner.checkpoint_bytes)
        terms = balance.loss_terms(spec.model.moe.balance) if spec.model.moe else ()
        self._reporter = telemetry.Reporter(
            [(term.kind, term.coefficient) for term in terms],
            sparse=spec.model.moe is not None,
            cuda=self.ranks.device.type == "cuda",
            router_prob=spec.telemetry.router_prob,
            flops_per_token=accounting.price(spec).flops_per_token.training,
            peak_flop_per_s=telemetry.peak(spec.training.precision, self.ranks),
            mtp_weight=spec.model.mtp_weight if spec.model.mtp_depth else None,
        )
        self._spikes = SpikeDetector(spec.telemetry.spike_window, spec.telemetry.spike_threshold)
        self._vio_memory: deque[list[float]] = deque(maxlen=ROUTER_MEMORY_STEPS)
        self._resumed_from: int | None = None
        self._saved_step: int | None = None
        self._seconds_per_step = 0.0
        self._made: Made | None = None  # handed to the device, but not told of
        self._stop_asked = self._save_asked = False  # by any rank, in a step that was told of
        self._journal = Journal(out / "attempts" / str(attempt), first_rank=self.ranks.is_first)

    # ----- the run

    def run(self) -> Position:
        """Makes the remaining steps. Raises Stopped after SIGTERM, NotFinite at a NaN, DiskFull, and whatever torch raises."""
        steps = self.spec.training.steps
        self._record_start()
        if self.position.step and self._validation_due() and not self._validate():
            self._stop()  # The checkpoint was made by a stop in the middle of the validation that belongs to its step, and so is this one.
        while self.position.step < steps:
            if self.requests.stop and self.ranks.size == 1:
                self._stop()
            self.train_step()
            if self._validation_due() and not self._validate():
                self._stop()  # Every rank knows: another step would leave this one's validation out for ever.
            if self.position.step < steps:
                self._save_if_due()
                if self._stop_asked:
                    self._stop()
        if self.position.validated_step != steps and not self._validate():
            self._stop()
        self.save()
        return self.position

    def close(self) -> None:
        """Closes the spool, and ends the learner's threads."""
        self._journal.close()
        self.learner.close()

    def train_step(self) -> None:
        """Makes one step, and tells of it; of the one before instead, where the device is at it still. Raises NotFinite.

        What a step asks for is then done a step later, on all ranks alike: all read the same figures.
        """
        made = self.learner.make_step(self.position.step + 1, self.requests.take)
        self.catch_up()
        self.position.step, self._made = made.step, made
        if not self.learner.late:
            self.catch_up()

    def catch_up(self) -> None:
        """Tells of the step that was made last, if it has not been told of. Raises NotFinite. Collective."""
        if self._made is not None:
            made, self._made = self._made, None
            self._tell(self.learner.lesson(made))

    def _tell(self, lesson: Lesson) -> None:
        figures = lesson.figures
        self.position.loss = figures.loss
        self._stop_asked |= figures.stop
        self._save_asked |= figures.save
        self._report(lesson)
        if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
            what = f"loss is {figures.loss}" if not math.isfinite(figures.loss) else f"gradient norm is {figures.grad_norm}"
            saved = f"the last checkpoint is of step {self._saved_step}" if self._saved_step else "there is no checkpoint yet"
            raise NotFinite(f"step {lesson.step}: the {what}; {saved}")
        self._look_for_spike(lesson)

    def _stop(self) -> None:
        self.catch_up()
        if self.position.step:
            self.save()
        raise Stopped(f"stopped on request after step {self.position.step}")

    # ----- validation

    def _validation_due(self) -> bool:
        every = self.spec.training.eval_every
        return bool(every) and self.position.step % every == 0 and self.position.validated_step != self.position.step

    def _validate(self) -> bool:
        """Validates, unless a request to stop comes first; says whether it did."""
        self.catch_up()
        training, step = self.spec.training, self.position.step
        result = validate(
            self.learner.model,
            self.learner.batches,
            sequences=training.eval_batches * training.batch_size,
            micro_batch=training.batch_size // (training.grad_accumulation * self.ranks.size),
            ranks=self.ranks,
            autocast=self.learner.autocast,
            interrupted=lambda: self.requests.stop,
            specialisation=self.spec.telemetry.specialisation,
            probe_batch=self.spec.telemetry.probe_batch,
        )
        if result is None:
            return False
        if not math.isfinite(result.loss):
            raise NotFinite(f"step {step}: the validation loss is {result.loss}")
        self.position.validated_step, self.position.validation_loss = step, result.loss
        self._journal.record(
            events.EvalDone(
                step=step,
                at=time.time(),
                loss=result.loss,
                by_domain=result.by_domain,
                max_vio_global=result.max_vio_global,
                bits_per_byte=result.bits_per_byte,
                batch_dependence=result.batch_dependence,
            )
        )
        if found := result.specialisation:
            counts = (found.classes, found.domains, found.class_tokens, found.domain_tokens)
            self._journal.record(events.SpecialisationCounted(step, time.time(), *counts))
        domains = "  ".join(f"{name} {loss:.3f}" for name, loss in result.by_domain.items())
        self._journal.say(f"validation after step {step}: loss {result.loss:.4f}  ({domains})")
        return True

    # ----- checkpoints

    def resume(self) -> None:
        """Goes on from the newest checkpoint that verifies, if there is one. Raises SpecRefused where it is of another model."""
        step = -1
        if self.ranks.is_first:
            checkpoint.sweep(self._directory)
            newest, complaints = checkpoint.newest_whole(self._directory)
            for complaint in complaints:
                self._journal.say(f"a damaged checkpoint was put aside: {complaint}")
            step = -1 if newest is None else newest
        step = self.ranks.from_first(step)
        if step < 0:
            return
        tensors, state = handing.load_checkpoint(self.ranks, self._directory, step)
        self.learner.load(tensors)
        losses = {name: math.nan if state[name] is None else state[name] for name in ("loss", "validation_loss")}
        self.position = Position(step=step, validated_step=state["validated_step"], **losses)
        self._spikes = SpikeDetector(self._spikes.window, self._spikes.threshold, state["losses"], state["in_spike"])
        self._vio_memory.extend(state["vio_memory"])
        self._resumed_from = self._saved_step = step

    def begin(self, home: Path) -> None:
        """At a fresh start the weights that `spec.start` names are put into the model; `home` is moelab's directory. Raises SpecRefused."""
        if self.position.step == 0 and self.spec.start.kind != "scratch":
            from moe.train.start import begin  # only where it is asked for: it takes as long as a few steps to import

            with self.learner.whole_model() as model:
                if not self.ranks.is_spread:
                    self._journal.say(begin(self.spec, model, home, self.ranks))
                    return
                if self.ranks.is_first:  # the weights lie on this rank's host
                    self._journal.say(begin(self.spec, model, home, self.ranks.alone))
                for tensor in model.state_dict().values():
                    handing.from_first(self.ranks, tensor)

    def start_over(self) -> None:
        """Puts the checkpoints of earlier attempts aside, so that no later attempt goes on from them."""
        if self.ranks.is_first and self._directory.exists():
            self._directory.rename(self._directory.with_name(f"checkpoints.before-{time.time_ns()}"))

    def save(self) -> None:
        """A checkpoint of this step, which has been told of then, unless there is one; then the oldest beyond `keep_checkpoints` go."""
        self.catch_up()
        self._save_asked = False
        if self._saved_step == self.position.step:
            return
        self._saved_step = self.position.step
        tensors = self.learner.tensors()
        if not self.ranks.is_first:
            return
        self._journal.sync()  # A checkpoint must not outlive what is known of the steps before it.
        saved = checkpoint.save(self._directory, self.position.step, tensors, self._state())
        self._journal.record(
            events.CheckpointSaved(
                step=saved.step, at=time.time(), path=str(saved.path), size_bytes=saved.size_bytes, sha256=saved.sha256, seconds=saved.seconds
            )
        )
        self._journal.say(f"checkpoint of step {saved.step}: {saved.size_bytes / 1e6:.1f} MB in {saved.seconds:.2f} s")
        checkpoint.prune(self._directory, self.spec.training.keep_checkpoints, saved)

    def _state(self) -> dict[str, Any]:
        position = self.position
        return {
            "step": position.step,
            "loss": position.loss,
            "validated_step": position.validated_step,
            "validation_loss": position.validation_loss if math.isfinite(position.validation_loss) else None,
            "losses": list(self._spikes.losses),
            "in_spike": self._spikes.inside,
            "vio_memory": list(self._vio_memory),
            "attempt": self.attempt,
            "seed": self.spec.seed,
            "spec": self.spec.model_dump(mode="json"),
            "world_size": self.ranks.size,
            "torch": torch.__version__,
        }

    def _save_if_due(self) -> None:
        every = self.spec.training.checkpoint_every
        if self._save_asked or (every and self.position.step % every == 0):
            self.save()

    # ----- reports

    def _record_start(self) -> None:
        spec, model = self.spec, self.learner.model
        price = accounting.price(spec)
        device = torch.cuda.get_device_name(self.ranks.device) if self.ranks.device.type == "cuda" else "cpu"
        self._journal.record(
            events.RunStarted(
                attempt=self.attempt,
                at=time.time(),
                resumed_from_step=self._resumed_from,
                world_size=self.ranks.size,
                devices=[device] * self.ranks.size,
                total_params=sum(parameter.numel() for parameter in self.learner.parameters),
                active_params=price.active_params.with_embeddings,
                tokens_per_step=spec.training.batch_size * spec.data.seq_len,
                steps=spec.training.steps,
                moe_layers=list(model.moe_layers),
                n_experts=spec.model.moe.n_experts if spec.model.moe else 0,
                top_k=spec.model.moe.top_k if spec.model.moe else 0,
                phases=list(telemetry.PHASES),
                balance_terms=list(model.balance_terms),
                ops=self.implementations(),
                versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            )
        )
        experts = f", {len(model.moe_layers)} MoE layers of {spec.model.moe.n_experts} experts" if spec.model.moe else ""
        self._journal.say(
            f"{spec.name}: {price.total_params:,} parameters, {price.active_params.with_embeddings:,} active{experts}; "
            f"{self.ranks.size} x {device}; " + (f"going on after step {self._resumed_from}" if self._resumed_from is not None else "from the start")
        )

    def implementations(self) -> dict[str, str]:
        """Which implementation runs each operation."""
        moe, dtype = self.spec.model.moe, torch.bfloat16 if self.spec.training.precision == "bfloat16" else torch.float32
        padded = moe is not None and moe.capacity.padded
        masked = is_masked(self.spec.model) or self.spec.data.packing == "documents"
        aligned = moe is None or is_aligned(self.spec.model.d_model, moe.d_expert)
        scored = (moe.n_experts, moe.top_k) if moe is not None and takes_highest(moe.router.kind) else None
        compiled = self.spec.training.compile
        return implementations(self.ranks.device, dtype, padded=padded, masked=masked, aligned=aligned, compiled=compiled, scored=scored)

    def _report(self, lesson: Lesson) -> None:
        spec, step, figures = self.spec, lesson.step, lesson.figures
        last = step == spec.training.steps
        tokens = spec.training.batch_size * spec.data.seq_len
        if step % spec.telemetry.every == 0 or last or not math.isfinite(figures.loss):
            if names := self._reporter.declare(figures):
                self._journal.record(events.MetricsDeclared(names=names))
            scalars = self._reporter.scalars(figures, lesson.rate, tokens, lesson.seconds)
            sampled = lesson.sample.tensors() if lesson.sample is not None else {}
            self._journal.record(events.StepDone(step, time.time(), scalars, self._reporter.tensors(figures, lesson.phase_ms) | sampled))
        smoothing = 0.1 if self._seconds_per_step else 1.0
        self._seconds_per_step += smoothing * (lesson.seconds - self._seconds_per_step)
        speed, router = self._reporter.speed(tokens / self._seconds_per_step), ""
        if figures.tokens_LE is not None:
            dead = np.count_nonzero(figures.tokens_LE == 0)
            router = f"  MaxVio {telemetry.max_vio(figures.tokens_LE).mean():.2f}  dead {dead}"
        self._journal.progress(
            f"step {step}/{spec.training.steps}  loss {figures.loss:.4f}  lr {lesson.rate:.2e}  {speed}"
            f"{router}  left {duration((spec.training.steps - step) * self._seconds_per_step)}",
            always=last or step == 1,
        )

    def _look_for_spike(self, lesson: Lesson) -> None:
        figures = lesson.figures
        spike = self._spikes.observe(figures.loss)
        if spike:
            before_L = np.mean(self._vio_memory, axis=0) if self._vio_memory else np.zeros(len(self.learner.model.moe_layers))
            self._journal.record(
                events.SpikeDetected(
                    step=lesson.step,
                    at=time.time(),
                    loss=spike.loss,
                    median=spike.median,
                    deviation=spike.deviation,
                    score=spike.score,
                    router=telemetry.router_at_spike(figures, before_L, self.learner.model.moe_layers),
                )
            )
            self._journal.say(f"loss spike at step {lesson.step}: {spike.loss:.4f}, {spike.score:.1f} deviations above {spike.median:.4f}")
        if figures.tokens_LE is not None:
            self._vio_memory.append(telemetry.max_vio(figures.tokens_LE).tolist())


def _check_disk(out: Path, checkpoint_bytes: int) -> None:
    free = shutil.disk_usage(out).free
    if free < RESERVE * checkpoint_bytes:
        raise DiskFull(f"{out} has {free / 1e9:.2f} GB free; a checkpoint takes {checkpoint_bytes / 1e9:.2f} GB, and {RESERVE} must fit")
