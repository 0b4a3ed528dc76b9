"""A stop that reaches one of two ranks in the middle of a validation ends both, and the next attempt makes the validation that is owed.

So does a full disk, if it is the one that checkpoints are written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe.parallel import Mesh
from moe.train import corpus, handing, loop, validation
from moe.train.batches import Batches
from moe.train.learner import Learner
from moe.train.loop import Training
from moe.train.ranks import Ranks
from moe.train.stop import DiskFull, Requests, Stopped
from spec import events
from spec.accounting import price
from spec.experiment import ExperimentSpec
from tests.moe.parallel.ranks import on_ranks
from tests.moe.train.tiny import HOME, read_events, tiny

STEPS, DUE = 4, 2


def spec() -> ExperimentSpec:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 16, "balance": [{"kind": "z_loss"}]}
    training = {"steps": STEPS, "batch_size": 4, "eval_every": DUE, "eval_batches": 4, "checkpoint_every": 0}
    return tiny(model={"d_model": 16, "d_ff": 24, "moe": moe}, training=training, parallel={"expert": 2})


def attempt(out: Path, number: int, after: int | None) -> dict[str, Any]:
    """One attempt on this rank, asked to stop when its validations have looked `after` times whether they are to: how it ended."""
    described = spec()
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), Mesh.of(1, 2))
    batches = Batches(corpus.load(described.data, HOME), described.data.seq_len, described.training.batch_size, described.seed)
    requests, looked = Requests(), 0
    training = Training(described, Learner(described, batches, ranks), out, number, requests)

    def validate_counting(*args: Any, interrupted: Callable[[], bool], **options: Any) -> validation.Validation | None:
        def asked() -> bool:  # once for each batch of a validation
            nonlocal looked
            looked += 1
            requests.stop |= looked == after
            return interrupted()

        return validation.validate(*args, interrupted=asked, **options)

    loop.validate = validate_counting
    try:
        training.resume()
        training.begin(HOME)
        training.run()
        ended = "finished"
    except Stopped as stopped:
        ended = str(stopped)
    finally:
        training.close()
    return {"ended": ended, "looked": looked}


def on_a_full_disk(out: Path, full: int) -> str:
    """How the check for room ends where rank `full` has a byte less than three checkpoints need."""
    size = price(spec()).bytes.checkpoint
    usage = shutil.disk_usage("/")._replace(free=3 * size - (dist.get_rank() == full))
    with patch.object(shutil, "disk_usage", lambda path: usage):
        try:
            handing.check_room(Ranks(dist.get_rank(), 2, torch.device("cpu")), out / "empty", size, 3)
        except DiskFull:
            return "disk full"
    return "room"


def both(directory: str) -> dict[str, list[Any]]:
    """A run that nothing stops; one whose second rank is asked in its validation's third batch; and the attempt after that. And full disks."""
    second, home = dist.get_rank() == 1, Path(directory)
    runs = [attempt(home / "whole", 0, None), attempt(home / "stopped", 0, 3 if second else None), attempt(home / "stopped", 1, None)]
    return {"runs": runs, "full": [on_a_full_disk(home, full) for full in (0, 1)]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[Any]]]]:
    directory = tmp_path_factory.mktemp("stop")
    return directory, on_ranks(2, directory / "ranks", both, str(directory))


def test_both_ranks_stop_in_the_middle(home: tuple[Path, list[dict[str, list[Any]]]]) -> None:
    whole, stopped, resumed = zip(*(rank["runs"] for rank in home[1]), strict=True)
    assert [one["ended"] for one in (*whole, *resumed)] == ["finished"] * 4
    assert {one["ended"] for one in stopped} == {f"stopped on request after step {DUE}"}
    assert all(2 < one["looked"] < whole[0]["looked"] / 2 for one in stopped), "in the middle of the first of two validations"


def test_a_full_disk_ends_both_where_it_is_the_first_ranks(home: tuple[Path, list[dict[str, list[Any]]]]) -> None:
    assert [rank["full"] for rank in home[1]] == [["disk full", "room"]] * 2, "rank 0 alone writes checkpoints"


def test_the_next_attempt_validates_what_was_owed_and_goes_on_as_if_nothing_had_been(home: tuple[Path, list[dict[str, list[Any]]]]) -> None:
    def validations(run: str, number: int) -> dict[int, float]:
        return {event.step: event.loss for event in read_events(home[0] / run, number) if isinstance(event, events.EvalDone)}

    def losses(run: str, number: int) -> dict[int, list[float]]:
        told = read_events(home[0] / run, number)
        return {event.step: event.scalars[:2].tolist() for event in told if isinstance(event, events.StepDone)}

    whole = validations("whole", 0)
    assert list(whole) == [DUE, STEPS]
    assert validations("stopped", 0) == {}
    assert validations("stopped", 1) == whole
    assert losses("stopped", 0) | losses("stopped", 1) == losses("whole", 0)
