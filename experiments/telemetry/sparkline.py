"""The loss of many runs at once, in at most 40 points each: one row for each point, by key."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.models import Run
from experiments.telemetry.rows import LEVELS, query

POINTS = 40
METRICS = ("lm_loss", "loss")
"""The first that a run has: without balancing terms and extra predictions, where it tells that apart."""

_STEPS = """
SELECT w.run, s.vals[w.place] FROM unnest(%s::bigint[], %s::int[], %s::int[]) AS w(run, step, place)
JOIN experiments_stepscalar s ON s.run_id = w.run AND s.step = w.step ORDER BY w.run, w.step
"""
_BUCKETS = """
SELECT w.run, s.sums[w.place] / NULLIF(s.counts[w.place], 0)
FROM unnest(%s::bigint[], %s::int[], %s::int[], %s::int[]) AS w(run, step, place, level)
JOIN experiments_scalarrollup s ON s.run_id = w.run AND s.level = w.level AND s.bucket = w.step ORDER BY w.run, w.step
"""


def sparklines(run_ids: Sequence[int]) -> dict[int, list[float]]:
    """The loss of each run, evenly spread over its steps: single ones of short runs and of those that tell rarely, means of buckets else."""
    steps: list[tuple[int, int, int]] = []
    buckets: list[tuple[int, int, int, int]] = []
    asked = Run.objects.filter(pk__in=run_ids).values_list("pk", "last_step", "metric_names", "spec__telemetry__every")
    for run_id, last, names, every in asked:
        metric = next((metric for metric in METRICS if metric in names), None)
        if metric is None:
            continue
        place = names.index(metric) + 1
        level = max((level for level in LEVELS if last >= POINTS * level), default=1)
        if level <= (every or 1):  # a run that tells rarely: buckets may be empty, so the steps that it told
            steps += [(run_id, step, place) for step in _told(last, every or 1)]
        else:
            buckets += [(run_id, bucket, place, level) for bucket in _spread(0, last // level - 1)]
    lines: dict[int, list[float]] = {run_id: [] for run_id in run_ids}
    for sql, wanted in ((_STEPS, steps), (_BUCKETS, buckets)):
        if wanted:
            for run_id, value in query(sql, [list(column) for column in zip(*wanted, strict=True)]):
                if value is not None and math.isfinite(value):
                    lines[run_id].append(value)
    return lines


def _told(last: int, every: int) -> list[int]:
    """At most POINTS + 1 of the steps that are told: every `every`th, and the last."""
    return sorted({*(every * row for row in _spread(1, last // every)), last})


def _spread(first: int, last: int) -> list[int]:
    """At most POINTS whole numbers from `first` to `last`, both included."""
    count = last - first + 1
    if count <= POINTS:
        return list(range(first, last + 1))
    return sorted({first + round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
