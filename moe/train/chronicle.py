"""What a run tells of itself, step after step: events for the spool, lines for the terminal, and the spikes that it watches for.

Sizes are the whole model's, by the accountant: what a rank holds is its own part only.
"""

from __future__ import annotations

import math
import platform
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from kernels import dispatch
from moe import balance
from moe.attention import is_masked
from moe.router_kinds import takes_highest
from moe.train import telemetry
from moe.train.checkpoint import Saved
from moe.train.journal import Journal, duration
from moe.train.learner import Learner, Lesson
from moe.train.spikes import SpikeDetector
from moe.train.validation import Validation
from spec import accounting, events
from spec.experiment import ExperimentSpec

ROUTER_MEMORY_STEPS = 16  # What the router did "before" a spike is its mean over this many steps.


class Chronicle:
    """Writes down a learner's run. What it remembers of the steps goes with the checkpoints."""

    def __init__(self, spec: ExperimentSpec, learner: Learner, journal: Journal) -> None:
        self.spec, self.ranks, self._journal = spec, learner.ranks, journal
        self._moe_layers, self._balance_terms = learner.model.moe_layers, learner.model.balance_terms
        self._price = accounting.price(spec)
        terms = balance.loss_terms(spec.model.moe.balance) if spec.model.moe else ()
        self._reporter = telemetry.Reporter(
            [(term.kind, term.coefficient) for term in terms],
            sparse=spec.model.moe is not None,
            cuda=self.ranks.device.type == "cuda",
            router_prob=spec.telemetry.router_prob,
            flops_per_token=self._price.flops_per_token.training,
            peak_flop_per_s=telemetry.peak(self._products(), self.ranks),
            mtp_weight=spec.model.mtp_weight if spec.model.mtp_depth else None,
        )
        self._spikes = SpikeDetector(spec.telemetry.spike_window, spec.telemetry.spike_threshold)
        self._vio_memory: deque[list[float]] = deque(maxlen=ROUTER_MEMORY_STEPS)
        self._seconds_per_step = 0.0

    def _products(self) -> str:
        """The precision of the run's products, in the words of `spec.peak.Peak`: "plain" for float32 that no Triton makes on matrix units."""
        precision = self.spec.training.precision
        on_triton = self.spec.model.moe is not None and implementations(self.spec, self.ranks.device)["expert_ffn"] == "triton"
        return "plain" if precision == "float32" and not on_triton else precision

    # ----- what it remembers

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the steps before it."""
        return {"losses": list(self._spikes.losses), "in_spike": self._spikes.inside, "vio_memory": list(self._vio_memory)}

    def resume(self, state: dict[str, Any]) -> None:
        """Remembers what `state` returned."""
        self._spikes = SpikeDetector(self._spikes.window, self._spikes.threshold, state["losses"], state["in_spike"])
        self._vio_memory.extend(state["vio_memory"])

    # ----- what it tells

    def started(self, attempt: int, resumed_from: int | None) -> None:
        """The model stands, as it is after step `resumed_from`."""
        spec, moe, price = self.spec, self.spec.model.moe, self._price
        device = torch.cuda.get_device_name(self.ranks.device) if self.ranks.device.type == "cuda" else "cpu"
        self._journal.record(
            events.RunStarted(
                attempt=attempt,
                at=time.time(),
                resumed_from_step=resumed_from,
                world_size=self.ranks.size,
                devices=[device] * self.ranks.size,
                total_params=price.total_params,
                active_params=price.active_params.with_embeddings,
                tokens_per_step=price.tokens_per_step,
                steps=spec.training.steps,
                moe_layers=list(self._moe_layers),
                n_experts=moe.n_experts if moe else 0,
                top_k=moe.top_k if moe else 0,
                phases=list(telemetry.PHASES),
                balance_terms=list(self._balance_terms),
                ops=implementations(spec, self.ranks.device),
                versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            )
        )
        experts = f", {len(self._moe_layers)} MoE layers of {moe.n_experts} experts" if moe else ""
        self._journal.say(
            f"{spec.name}: {price.total_params:,} parameters, {price.active_params.with_embeddings:,} active{experts}; "
            f"{self.ranks.size} x {device}; " + (f"going on after step {resumed_from}" if resumed_from is not None else "from the start")
        )

    def step(self, lesson: Lesson) -> None:
        """The figures of a step."""
        spec, step, figures, tokens = self.spec, lesson.step, lesson.figures, self._price.tokens_per_step
        last = step == spec.training.steps
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

    def look_for_spike(self, lesson: Lesson) -> None:
        """Tells of a spike, if the step's loss is one, and remembers the step."""
        figures = lesson.figures
        spike = self._spikes.observe(figures.loss)
        if spike:
            before_L = np.mean(self._vio_memory, axis=0) if self._vio_memory else np.zeros(len(self._moe_layers))
            self._journal.record(
                events.SpikeDetected(
                    step=lesson.step,
                    at=time.time(),
                    loss=spike.loss,
                    median=spike.median,
                    deviation=spike.deviation,
                    score=spike.score,
                    router=telemetry.router_at_spike(figures, before_L, self._moe_layers),
                )
            )
            self._journal.say(f"loss spike at step {lesson.step}: {spike.loss:.4f}, {spike.score:.1f} deviations above {spike.median:.4f}")
        if figures.tokens_LE is not None:
            self._vio_memory.append(telemetry.max_vio(figures.tokens_LE).tolist())

    def validated(self, step: int, result: Validation) -> None:
        """What a validation after `step` found."""
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

    def saved(self, saved: Saved) -> None:
        """A checkpoint was published."""
        self._journal.record(
            events.CheckpointSaved(
                step=saved.step, at=time.time(), path=str(saved.path), size_bytes=saved.size_bytes, sha256=saved.sha256, seconds=saved.seconds
            )
        )
        self._journal.say(f"checkpoint of step {saved.step}: {saved.size_bytes / 1e6:.1f} MB in {saved.seconds:.2f} s")


def implementations(spec: ExperimentSpec, device: torch.device) -> dict[str, str]:
    """Which implementation runs each operation of the spec's model on `device`."""
    moe, dtype = spec.model.moe, torch.bfloat16 if spec.training.precision == "bfloat16" else torch.float32
    return dispatch.implementations(
        device,
        dtype,
        padded=moe is not None and moe.capacity.padded,
        masked=is_masked(spec.model) or spec.data.packing == "documents",
        aligned=moe is None or dispatch.is_aligned(spec.model.d_model, moe.d_expert),
        scored=(moe.n_experts, moe.top_k) if moe is not None and takes_highest(moe.router.kind) else None,
        compiled=spec.training.compile,
    )
