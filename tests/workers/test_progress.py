"""Telling a hang from a long step."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from spec import events, spool
from workers.progress import Progress


def test_patience_before_and_after_the_first_step(tmp_path: Path) -> None:
    path = tmp_path / "events.spool"
    progress = Progress(path, now=0.0, first_step_s=300, later_s=120)
    progress.look(299.0)
    assert progress.silent_too_long(299.0) is None
    assert progress.silent_too_long(301.0) == 301.0
    with spool.Writer(path) as writer:
        writer.append(events.encode(events.RunStarted(attempt=1, at=time.time())))
        progress.look(310.0)
        assert progress.started and not progress.stepped
        assert progress.silent_too_long(600.0) is None
        writer.append(events.encode(events.StepDone(step=1, at=0.0, scalars=np.zeros(1, np.float32))))
        progress.look(400.0)
        assert progress.stepped
        assert progress.silent_too_long(519.0) is None
        assert progress.silent_too_long(521.0) == 121.0


def test_a_run_of_long_steps_is_given_ten_times_its_longest(tmp_path: Path) -> None:
    path = tmp_path / "events.spool"
    progress = Progress(path, now=0.0, first_step_s=300, later_s=120)
    with spool.Writer(path) as writer:
        for step, now in ((1, 10.0), (2, 50.0), (3, 90.0)):
            writer.append(events.encode(events.StepDone(step=step, at=0.0, scalars=np.zeros(1, np.float32))))
            progress.look(now)
    assert progress.silent_too_long(90.0 + 399) is None
    assert progress.silent_too_long(90.0 + 401) == 401.0
