"""Every method of the registry makes its steps in the real learner, and reports the metrics that the registry says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.train.batches import Batches
from moe.train.learner import Learner
from moe.train.loop import Training
from moe.train.ranks import Ranks
from moe.train.stop import Requests
from spec import events
from spec.experiment import ExperimentSpec
from spec.methods import Method, methods
from tests.moe.train.test_golden import text
from tests.moe.train.test_golden_compiled import NO_COMPILER
from tests.moe.train.tiny import read_events

# Ranks and starting points need processes and files: their own tests have them.
ELSEWHERE = {"data_parallel", "expert_parallel", "sharded", "fine_tune", "huggingface", "upcycle_copy", "upcycle_granular"}
MARKS = {"compile": NO_COMPILER}
HERE = [
    pytest.param(entry, id=entry.key, marks=MARKS.get(entry.key, ())) for entry in methods() if not entry.priced_only and entry.key not in ELSEWHERE
]
METRIC = re.compile(r"\b(?:(?:router|balance)/\w+|mtp_loss|dropped_share|grad_norm)\b")


def shrunk(entry: Method) -> ExperimentSpec:
    plain = entry.experiment().model_dump()
    plain["model"].update(n_layers=2)
    if entry.key == "chunks":
        plain["model"]["attention"]["nope_every"] = 2
    plain["data"]["seq_len"] = 32
    plain["training"].update(batch_size=2, steps=2)
    return ExperimentSpec.model_validate(plain)


@pytest.mark.parametrize("entry", HERE)
def test_it_trains_and_reports_what_the_registry_says(entry: Method, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    spec = shrunk(entry)
    batches = Batches([text()], 32, 2, spec.seed, by_document=spec.data.packing == "documents")
    training = Training(spec, Learner(spec, batches, Ranks(0, 1, torch.device("cpu"))), tmp_path, 0, Requests())
    try:
        training.train_step()
        training.train_step()
    finally:
        training.close()
    told = read_events(tmp_path)
    [names] = [event.names for event in told if isinstance(event, events.MetricsDeclared)]
    steps = [event for event in told if isinstance(event, events.StepDone)]
    assert len(steps) == 2
    for name in {"loss", "grad_norm", *METRIC.findall(entry.reports)}:
        assert all(np.isfinite(step.scalars[names.index(name)]) for step in steps), name
