"""What every-step telemetry costs a step: `python -m benchmarks telemetry_overhead`.

Pairs of optimiser steps of one model, one with all of it (statistics in every MoE layer, one copy to the host, scalars, tensors
and the spool on disk), one that only reads its loss, in changing order. On a CPU the time is the process's own CPU time, which
other work on the machine changes little; on a CUDA device it is wall time. `percent` is the median difference of a pair, with
its standard error beside it; `attributed_percent` is the time spent within telemetry's own calls, which is less noisy but leaves
out what telemetry does to caches.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from moe.train.loop import Training


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """{percent, percent_error, attributed_percent, layers, experts, step_ms, pairs, device}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks telemetry_overhead", description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=30, help="steps with and without (default %(default)s)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory(prefix="moelab-overhead-") as directory:
        training = _training(args, Path(directory))
        device = training.ranks.device.type
        clock = time.process_time if device == "cpu" else time.perf_counter
        own: list[float] = []

        def told() -> None:
            with _counting(training, clock, own):
                training.train_step()
                training.catch_up()

        def silent() -> None:
            with without_statistics():
                lm_loss, *_ = training.learner.learn(training.position.step, 0.0)
                lm_loss.item()  # any trainer reads its loss

        with contextlib.redirect_stdout(sys.stderr):
            times = [_pair(told, silent, clock, first_told=index % 2 == 1) for index in range(args.pairs + 2)][2:]
    step = statistics.median(silent_s for _, silent_s in times)
    extra = [told_s - silent_s for told_s, silent_s in times]
    return {
        "percent": round(100 * statistics.median(extra) / step, 3),
        "percent_error": round(100 * 1.25 * statistics.stdev(extra) / len(extra) ** 0.5 / step, 3),
        "attributed_percent": round(100 * statistics.median(own[2:]) / step, 3),
        "layers": args.layers,
        "experts": args.experts,
        "step_ms": round(1000 * step, 2),
        "pairs": args.pairs,
        "device": device,
    }


def _pair(told: Callable[[], None], silent: Callable[[], None], clock: Callable[[], float], *, first_told: bool) -> tuple[float, float]:
    """Seconds of a step with telemetry and of one without."""

    def seconds(step: Callable[[], None]) -> float:
        started = clock()
        step()
        return clock() - started

    if first_told:
        return seconds(told), seconds(silent)
    silent_s = seconds(silent)
    return seconds(told), silent_s


def _training(args: argparse.Namespace, directory: Path) -> Training:
    """A run that is ready for its first step."""
    import torch

    from moe.train import corpus
    from moe.train.batches import Batches
    from moe.train.learner import Learner
    from moe.train.loop import Training
    from moe.train.ranks import join
    from moe.train.stop import Requests
    from spec.experiment import ExperimentSpec

    spec = ExperimentSpec.model_validate(
        {
            "model": {
                "n_layers": args.layers,
                "d_model": args.width,
                "moe": {"n_experts": args.experts, "top_k": min(8, args.experts), "d_expert": args.width // 2},
            },
            "data": {"domains": ["tables"]},
            "training": {"steps": 1_000_000, "batch_size": args.batch},
        }
    )
    torch.set_num_threads(1)
    place = join(spec.parallel)
    batches = Batches(corpus.load(spec.data, directory), spec.data.seq_len, spec.training.batch_size, spec.seed)
    return Training(spec, Learner(spec, batches, place), directory / "run", 0, Requests())


@contextmanager
def _counting(training: Training, clock: Callable[[], float], own: list[float]) -> Iterator[None]:
    """Appends the seconds of a step that are spent outside the step's mathematics, and within the layers' statistics."""
    from moe import layer

    learn, measured, inside, started = training.learner.learn, layer.layer_stats, 0.0, clock()

    def timed_learn(*arguments: Any) -> Any:
        nonlocal inside
        begin = clock()
        result = learn(*arguments)
        inside += clock() - begin
        return result

    def timed_statistics(*arguments: Any) -> Any:
        nonlocal inside
        begin = clock()
        result = measured(*arguments)
        inside -= clock() - begin
        return result

    with patch.object(training.learner, "learn", timed_learn), patch.object(layer, "layer_stats", timed_statistics):
        yield
    own.append(clock() - started - inside)


@contextmanager
def without_statistics() -> Iterator[None]:
    """MoE layers that report nothing but an empty shell."""
    import torch

    from moe import layer
    from moe.routing import LayerStats

    empty = torch.zeros(())
    with patch.object(layer, "layer_stats", lambda *_: LayerStats(empty, empty, empty, empty, empty, empty)):
        yield
