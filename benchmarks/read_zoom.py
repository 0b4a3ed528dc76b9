"""How long it takes to answer any zoom of a run of 1,000,000 steps with 20 scalars and 16 x 64 expert counts, on the server's side.

    python -m benchmarks read_zoom [--steps 1000000] [--requests 400]

Ranges are log-uniform in width, from one step to the whole run, at any place. Three kinds of request in turn, as the run
page makes them: all scalars; one layer's counts over the steps; all layers' counts and the loss. The time is that of
`steps_block`: choice of level, queries, unpacking, the finished bytes. Network and Django's dispatch are not in it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import service


def main(argv: Sequence[str] = ()) -> dict[str, Any]:
    """{"steps", "p50_ms", "p99_ms", …}"""
    parser = argparse.ArgumentParser(prog="python -m benchmarks read_zoom")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=400)
    asked = parser.parse_args(argv)
    with service.database():
        run = service.make_run()
        fill(run, asked.steps)
        return {"steps": asked.steps, **_measure(run.pk, asked.steps, asked.requests)}


def fill(run: Any, steps: int) -> None:
    """Writes the run straight into the tables with the store's own writers, in slices of 65,536 steps; its payloads repeat."""
    from django.db import connection, transaction

    from experiments.models import Run
    from experiments.telemetry import copy, payload, rollup
    from experiments.telemetry.batch import Steps, TensorRows

    names = ["loss", *(f"metric_{i}" for i in range(1, service.SCALARS))]
    Run.objects.filter(pk=run.pk).update(metric_names=names, moe_layers=list(range(service.LAYERS)), n_experts=service.EXPERTS, top_k=2)
    counts = service.counts(256)
    packed = payload.encode_rows(counts)
    rng = np.random.default_rng(2)
    for first in range(1, steps + 1, 16384):
        step = np.arange(first, min(first + 16384, steps + 1))
        scalars = rng.random((len(step), service.SCALARS), np.float32)
        tensor = TensorRows("expert_tokens", np.arange(len(step)), counts[step % 256])
        part = Steps(step, 1.7e9 + step.astype(np.float64), scalars, [tensor])
        keys = [(5, 8, run.pk, 2, 1, 4, number) for number in step.tolist()]
        payloads = [packed[number % 256] for number in step.tolist()]
        with transaction.atomic(), connection.cursor() as cursor:
            copy.into(cursor, "stepscalar", "run_id, step, at, attempt, vals", copy.scalar_rows(run.pk, 1, part))
            rows = copy.tensor_rows(copy.STEP_TENSOR, keys, counts.shape[1:], payloads)
            copy.into(cursor, "steptensor", "run_id, kind, step, shape, payload", rows)
            rollup.close(run.pk, service.SCALARS, part, first - 1, int(step[-1]))
    Run.objects.filter(pk=run.pk).update(last_step=steps)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")


def _measure(run_id: int, steps: int, requests: int) -> dict[str, Any]:
    from experiments.telemetry.read import Facts, steps_block

    rng = np.random.default_rng(3)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("scalars", {"names": None}),
        ("layer", {"names": [], "kinds": ["expert_tokens"], "layer": 3}),
        ("layers", {"names": ["loss"], "kinds": ["expert_tokens"], "points": 500}),
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in kinds}
    for i in range(requests + 30):
        width = int(math.exp(rng.uniform(0, math.log(steps))))
        low = int(rng.integers(1, steps - width + 2))
        name, asked = kinds[i % 3]
        start = time.perf_counter()
        steps_block(Facts.fetch(run_id), low, low + width - 1, **asked)
        if i >= 30:
            times[name].append((time.perf_counter() - start) * 1000)
    whole = [value for values in times.values() for value in values]
    of_each = {name: {"p50_ms": _percentile(values, 50), "p99_ms": _percentile(values, 99)} for name, values in times.items()}
    return {"p50_ms": _percentile(whole, 50), "p99_ms": _percentile(whole, 99), "requests": requests, "of_each": of_each}


def _percentile(values: list[float], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 2)
