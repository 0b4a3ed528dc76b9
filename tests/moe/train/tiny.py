"""A model that trains in milliseconds, and runs of it inside this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe.train import corpus
from moe.train.batches import Batches
from moe.train.learner import Learner
from moe.train.loop import Position, Training
from moe.train.ranks import Ranks
from moe.train.stop import Requests
from spec import events, spool
from spec.experiment import ExperimentSpec

HOME = Path(os.environ["MOELAB_HOME"])


def tiny(**changes: dict[str, Any]) -> ExperimentSpec:
    """Two MoE layers of four experts, 32 wide; `changes` are merged into the parts of the spec."""
    parts: dict[str, dict[str, Any]] = {
        "model": {
            "n_layers": 2,
            "d_model": 32,
            "d_ff": 64,
            "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1},
            "moe": {"n_experts": 4, "top_k": 2, "d_expert": 32, "balance": [{"kind": "switch_aux"}, {"kind": "z_loss"}]},
        },
        "data": {"domains": ["tables"], "seq_len": 32},
        "optimizer": {"warmup_steps": 4},
        "training": {"steps": 12, "batch_size": 4, "eval_every": 5, "eval_batches": 2, "checkpoint_every": 4},
        "telemetry": {"spike_window": 8},
    }
    for name, change in changes.items():
        parts[name] = {**parts.get(name, {}), **change}
    return ExperimentSpec.model_validate({"name": "tiny", "seed": 3, **parts})


class Run:
    """A training in this process, with what it left behind."""

    def __init__(self, spec: ExperimentSpec, out: Path, attempt: int = 0, ranks: Ranks | None = None) -> None:
        torch.set_num_threads(1)
        self.requests = Requests()
        self.out, self.attempt = out, attempt
        by_document = spec.data.packing == "documents"
        batches = Batches(corpus.load(spec.data, HOME), spec.data.seq_len, spec.training.batch_size, spec.seed, by_document=by_document)
        self.learner = Learner(spec, batches, ranks or Ranks(0, 1, torch.device("cpu")))
        self.training = Training(spec, self.learner, out, attempt, self.requests)

    def go(self, before_step: Callable[[int], None] = lambda step: None) -> Position:
        """Resumes and trains; `before_step` is called with the number of each step that is about to be made."""
        make_step = self.learner.make_step

        def step_after_hook(step: int, wishes: Callable[[], tuple[bool, bool]]) -> object:
            before_step(step)
            return make_step(step, wishes)

        self.learner.make_step = step_after_hook  # type: ignore[method-assign, assignment]
        try:
            self.training.resume()
            self.training.begin(HOME)
            return self.training.run()
        finally:
            self.training.close()

    @property
    def events(self) -> list[events.Event]:
        return read_events(self.out, self.attempt)

    def steps(self) -> dict[int, events.StepDone]:
        return {event.step: event for event in self.events if isinstance(event, events.StepDone)}


def read_events(out: Path, attempt: int = 0) -> list[events.Event]:
    """Everything in an attempt's spool."""
    with spool.Reader(out / "attempts" / str(attempt) / "events.spool") as reader:
        return [events.decode(payload) for _, payload in reader.read(max_records=100_000, max_bytes=2**31)]
