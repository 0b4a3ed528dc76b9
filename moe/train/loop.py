"""The training loop: `Training.run` makes all the steps that a checkpoint has not made already, and tells what happens.

It writes the attempt's spool and the checkpoints (docs/protocol.md, sections 1 and 2); on ranks other than the first it is silent.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe.train import checkpoint, handing
from moe.train.chronicle import Chronicle
from moe.train.journal import Journal
from moe.train.learner import Learner, Lesson, Made
from moe.train.stop import NotFinite, Requests, Stopped
from moe.train.validation import validate
from spec import accounting
from spec.experiment import ExperimentSpec


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
        handing.check_room(self.ranks, out, accounting.price(spec).bytes.checkpoint, spec.training.keep_checkpoints)
        self._journal = Journal(out / "attempts" / str(attempt), first_rank=self.ranks.is_first)
        self._chronicle = Chronicle(spec, learner, self._journal)
        self._resumed_from: int | None = None
        self._saved_step: int | None = None
        self._made: Made | None = None  # handed to the device, but not told of
        self._stop_asked = self._save_asked = False  # by any rank, in a step that was told of

    # ----- the run

    def run(self) -> Position:
        """Makes the remaining steps. Raises Stopped after SIGTERM, NotFinite at a NaN, DiskFull, and whatever torch raises."""
        steps = self.spec.training.steps
        self._chronicle.started(self.attempt, self._resumed_from)
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
        self._chronicle.step(lesson)
        if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
            what = f"loss is {figures.loss}" if not math.isfinite(figures.loss) else f"gradient norm is {figures.grad_norm}"
            saved = f"the last checkpoint is of step {self._saved_step}" if self._saved_step else "there is no checkpoint yet"
            raise NotFinite(f"step {lesson.step}: the {what}; {saved}")
        self._chronicle.look_for_spike(lesson)

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
        self._chronicle.validated(step, result)
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
        self._chronicle.resume(state)
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
        self._chronicle.saved(saved)
        checkpoint.prune(self._directory, self.spec.training.keep_checkpoints, saved)

    def _state(self) -> dict[str, Any]:
        position = self.position
        return {
            "step": position.step,
            "loss": position.loss,
            "validated_step": position.validated_step,
            "validation_loss": position.validation_loss if math.isfinite(position.validation_loss) else None,
            **self._chronicle.state(),
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
