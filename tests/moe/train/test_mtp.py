"""A run that predicts further ahead: its loss, its own row of counts, and what validation leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spec import events
from tests.moe.train.tiny import Run, tiny


def test_the_extra_loss_is_reported_and_minimised(tmp_path: Path) -> None:
    base = tiny().model_dump()["model"]
    run = Run(tiny(model=base | {"mtp_depth": 2, "mtp_weight": 0.5}, training={"steps": 6, "batch_size": 4, "grad_accumulation": 2}), tmp_path)
    run.go()
    (started,) = [event for event in run.events if isinstance(event, events.RunStarted)]
    names = next(event.names for event in run.events if isinstance(event, events.MetricsDeclared))
    assert started.moe_layers == [0, 1, 2, 3]
    for step in run.steps().values():
        scalars = dict(zip(names, step.scalars.tolist(), strict=False))
        parts = scalars["lm_loss"] + scalars["balance/switch_aux"] + scalars["balance/z_loss"] + 0.5 * scalars["mtp_loss"]
        assert scalars["loss"] == pytest.approx(parts, rel=1e-5)
        # 4 sequences of 32 tokens, 2 experts each; a block that predicts k further sees k positions less.
        assert np.asarray(step.tensors["expert_tokens"]).sum(1).tolist() == [256, 256, 248, 240]
    first, last = (run.steps()[step].scalars[names.index("mtp_loss")] for step in (1, 6))
    assert last < first
    validated = [event for event in run.events if isinstance(event, events.EvalDone)]
    assert validated and validated[-1].loss == pytest.approx(float(scalars["lm_loss"]), abs=1)


def test_without_it_there_is_no_such_metric(tmp_path: Path) -> None:
    run = Run(tiny(training={"steps": 1, "batch_size": 4}), tmp_path)
    run.go()
    assert not any("mtp_loss" in event.names for event in run.events if isinstance(event, events.MetricsDeclared))
