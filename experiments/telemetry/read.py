"""Reading a run at any zoom: the level is chosen so that a range never costs more than about 2,000 rows.

Ranges are in steps, both ends included. At a level above 1 the ends reach out to the bounds of their buckets; the header's
`from` and `to` say what was read. The bucket that is still being filled is put together from the finer levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.models import Run
from experiments.telemetry import rows
from experiments.telemetry.batch import Steps
from experiments.telemetry.rows import FINER, LEVELS, Scalars, Tensors, bucket_of
from spec import block
from spec.events import TENSORS

Array = NDArray[Any]
MAX_POINTS = 2000
MAX_CELLS = 4_200_000
"""Numbers of all tensors in one answer, by their real sizes: 2,000 rows of two of 16 x 64. A single row may have more."""


class RangeError(ValueError):
    """The range cannot be answered; `parameter` would have to change, and the message begins with it."""

    def __init__(self, parameter: str, detail: str) -> None:
        super().__init__(f"{parameter}: {detail}")
        self.parameter = parameter
        self.detail = detail


@dataclass(frozen=True)
class Facts:
    """What reading needs of a run's row, as it was at one moment; `last` is its last step then."""

    run_id: int
    last: int
    names: tuple[str, ...]
    moe_layers: tuple[int, ...]
    n_experts: int
    top_k: int

    @classmethod
    def of(cls, run: Run) -> Facts:
        return cls(run.pk, run.last_step, tuple(run.metric_names), tuple(run.moe_layers), run.n_experts, run.top_k)

    @classmethod
    def fetch(cls, run_id: int) -> Facts:
        """Raises Run.DoesNotExist."""
        return cls.of(Run.objects.only("last_step", "metric_names", "moe_layers", "n_experts", "top_k").get(pk=run_id))


@dataclass(frozen=True)
class Zoom:
    """A range at a level: the keys (steps or buckets) low … high, which hold the steps first … last."""

    level: int
    low: int
    high: int
    first: int
    last: int


def zoom(facts: Facts, low: int, high: int | None, points: int, kinds: Sequence[str] = (), layer: int | None = None) -> Zoom:
    """The finest level at which the steps low … high make at most `points` rows, and `kinds` in them MAX_CELLS numbers.

    `layer` as in `tensors`. Raises RangeError where no level does.
    """
    high = facts.last if high is None else min(high, facts.last)
    low = max(low, 0)
    if high < low:
        return Zoom(1, low, high, low, high)
    points = min(points, MAX_POINTS)
    n_rows = high - max(low, 1) + 1
    if n_rows <= points and fits(facts, n_rows, kinds, 1, low, high, layer):
        return Zoom(1, low, high, low, high)
    for level in LEVELS:
        first, last = int(bucket_of(low, level)), int(bucket_of(high, level))
        n_rows = last - first + 1
        if n_rows <= (MAX_POINTS if level == LEVELS[-1] else points) and fits(facts, n_rows, kinds, level, first, last, layer):
            return Zoom(level, first, last, rows.first_step(first, level), min((last + 1) * level, facts.last))
    if n_rows > MAX_POINTS:
        limit = MAX_POINTS * LEVELS[-1]
        raise RangeError("to", f"steps {low} to {high} make more than {MAX_POINTS} rows at the coarsest level; ask for at most {limit} steps")
    raise RangeError("tensors", f"steps {low} to {high} make more than {MAX_CELLS} numbers at the coarsest level; ask for fewer, or for one layer")


def fits(facts: Facts, n_rows: int, kinds: Sequence[str], level: int, low: int, high: int, layer: int | None = None) -> bool:
    """Whether `n_rows` rows of `kinds`, as they are stored under the keys low … high, are at most MAX_CELLS numbers, or a single row."""
    return n_rows == 1 or not kinds or n_rows * cells(facts, kinds, level, low, high, layer) <= MAX_CELLS


def cells(facts: Facts, kinds: Sequence[str], level: int, low: int, high: int, layer: int | None = None) -> int:
    """Numbers that an answer's row has, of all `kinds` together: each is as large as its largest under the keys low … high."""
    sizes: dict[str, tuple[int, ...]] = {}
    for kind, shape in _shapes(facts, kinds, level, low, high):
        kept = (1, *shape[1:]) if layer is not None and TENSORS[kind].axes[0] == "layer" else shape
        sizes[kind] = tuple(map(max, sizes.get(kind, kept), kept))
    return sum(map(math.prod, sizes.values()))


def _shapes(facts: Facts, kinds: Sequence[str], level: int, low: int, high: int) -> set[tuple[str, tuple[int, ...]]]:
    """The shapes that `tensors` meets there, and of which kinds."""
    found = rows.shapes(facts.run_id, kinds, level, low, high)
    unfinished = None if level == 1 else _open_bucket(facts, level)
    if unfinished is not None and low <= unfinished <= high:
        found |= _shapes(facts, kinds, FINER[level], *_keys_below(facts, level, unfinished))
    return found


def _open_bucket(facts: Facts, level: int) -> int | None:
    """The bucket that is still being filled."""
    last = int(bucket_of(facts.last, level))
    return None if (last + 1) * level <= facts.last else last


def scalars(facts: Facts, level: int, low: int, high: int) -> Scalars:
    """The run's rows with keys low … high at `level`, the unfinished bucket included."""
    width = len(facts.names)
    if level == 1:
        return rows.scalars(facts.run_id, 1, low, min(high, facts.last), width)
    unfinished = _open_bucket(facts, level)
    found = rows.scalars(facts.run_id, level, low, high if unfinished is None else min(high, unfinished - 1), width)
    if unfinished is None or not low <= unfinished <= high:
        return found
    finer = scalars(facts, FINER[level], *_keys_below(facts, level, unfinished))
    return found.join(finer.reduce(np.full(len(finer), unfinished))) if len(finer) else found


def tensors(facts: Facts, kind: str, level: int, low: int, high: int, layer: int | None = None) -> Tensors:
    """The run's tensors likewise. `layer` keeps that row of kinds whose first axis is the layer."""
    only = layer if TENSORS[kind].axes[0] == "layer" else None
    if level == 1:
        return rows.tensors(facts.run_id, kind, 1, low, min(high, facts.last), layer=only)
    unfinished = _open_bucket(facts, level)
    found = rows.tensors(facts.run_id, kind, level, low, high if unfinished is None else min(high, unfinished - 1), layer=only)
    if unfinished is None or not low <= unfinished <= high:
        return found
    finer = tensors(facts, kind, FINER[level], *_keys_below(facts, level, unfinished), layer)
    return found.join(finer.reduce(np.full(len(finer), unfinished))) if len(finer) else found


def _keys_below(facts: Facts, level: int, bucket: int) -> tuple[int, int]:
    """The keys at the next finer level that `bucket` of `level` spans."""
    first, finer = rows.first_step(bucket, level), FINER[level]
    return (first, facts.last) if finer == 1 else (int(bucket_of(first, finer)), int(bucket_of(facts.last, finer)))


def steps_block(
    run: Run | Facts,
    low: int = 0,
    high: int | None = None,
    points: int = MAX_POINTS,
    names: Sequence[str] | None = None,
    kinds: Sequence[str] = (),
    layer: int | None = None,
) -> bytes:
    """The `steps` block of docs/protocol.md for the steps low … high (to the last one: None). `names`: which scalars, all where None.

    Raises RangeError, KeyError for an unknown scalar or tensor.
    """
    header, arrays = steps_arrays(run, low, high, points, names, kinds, layer)
    return block.encode(header, arrays)


def steps_arrays(
    run: Run | Facts,
    low: int = 0,
    high: int | None = None,
    points: int = MAX_POINTS,
    names: Sequence[str] | None = None,
    kinds: Sequence[str] = (),
    layer: int | None = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Header and arrays of `steps_block`."""
    facts = run if isinstance(run, Facts) else Facts.of(run)
    place = {name: i for i, name in enumerate(facts.names)}
    columns = [place[name] for name in (facts.names if names is None else names)]
    at = zoom(facts, low, high, points, kinds, layer)
    found = scalars(facts, at.level, at.low, at.high)
    arrays: dict[str, Array] = {"step": found.last.astype(np.uint32), "n": found.n.astype(np.uint32)}
    if at.level == 1:
        arrays["scalars"] = found.mins[:, columns]
    else:
        arrays |= {"scalars_min": found.mins[:, columns], "scalars_max": found.maxs[:, columns], "scalars_mean": found.means[:, columns]}
    for kind in kinds:
        stored = tensors(facts, kind, at.level, at.low, at.high, layer)
        if len(stored):
            arrays |= _aligned(kind, at.level, stored, found)
    header = _header(facts, at.level, at.first, at.last, int(found.n.sum()), [facts.names[i] for i in columns])
    return (header | {"layer": layer} if layer is not None else header), arrays


def live_block(facts: Facts, previous: int, steps: Steps) -> bytes:
    """The level-1 block of `steps`, just stored; it answers for every step after `previous`, the run's last one before."""
    step = steps.step
    found = rows.of_steps(step, steps.scalars)
    arrays: dict[str, Array] = {"step": step.astype(np.uint32), "n": found.n.astype(np.uint32), "scalars": steps.scalars}
    joined: dict[str, Tensors] = {}
    for part in steps.tensors:
        mine = Tensors(step[part.rows], np.ones(len(part.rows), np.int64), part.values)
        joined[part.kind] = joined[part.kind].join(mine) if part.kind in joined else mine
    for kind, values in joined.items():
        order = np.argsort(values.key)
        arrays |= _aligned(kind, 1, Tensors(values.key[order], values.n[order], values.sums[order]), found)
    names = list(facts.names[: steps.scalars.shape[1]])
    return block.encode(_header(facts, 1, min(previous + 1, int(step[0])), int(step[-1]), len(step), names), arrays)


def _header(facts: Facts, level: int, first: int, last: int, total: int, names: list[str]) -> dict[str, Any]:
    return {
        "type": "steps",
        "run": facts.run_id,
        "level": level,
        "from": first,
        "to": last,
        "total": total,
        "names": names,
        "moe_layers": list(facts.moe_layers),
        "n_experts": facts.n_experts,
        "top_k": facts.top_k,
    }


def _aligned(kind: str, level: int, stored: Tensors, found: Scalars) -> dict[str, Array]:
    """The tensors as an array with a row for each row of `found`, and, where steps lack one, how many had it."""
    summed = TENSORS[kind].reduce == "sum"
    values, n = stored.sums, stored.n
    if level > 1:
        values = values.astype(np.float64) if summed else (values / n.reshape(-1, *[1] * (values.ndim - 1))).astype(np.float32)
    if np.array_equal(stored.key, found.key):
        arrays = {kind: values}
        full = n
    else:
        _, to, frm = np.intersect1d(found.key, stored.key, assume_unique=True, return_indices=True)
        whole = np.full((len(found), *values.shape[1:]), 0 if summed else np.nan, values.dtype)
        whole[to] = values[frm]
        full = np.zeros(len(found), np.int64)
        full[to] = n[frm]
        arrays = {kind: whole}
    if not np.array_equal(full, found.n):
        arrays[f"{kind}_n"] = full.astype(np.uint32)
    return arrays
