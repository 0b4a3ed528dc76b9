"""Sums over 64, 1,024 and 16,384 steps, written when a bucket is over.

A bucket is over when its last step, or a later one, is in the store. Its row is always computed anew from the level below
and replaces what was there: written twice, or after steps that came late, it is the same. The bucket that is still being
filled has no row; `experiments.telemetry.read` makes one out of the finer rows, of which there are at most 93.
"""

from __future__ import annotations

import struct

import numpy as np
from django.db import connection
from numpy.typing import NDArray

from experiments.telemetry import copy, payload, rows
from experiments.telemetry.batch import Steps
from experiments.telemetry.rows import FINER, LEVELS, Scalars, Tensors, bucket_of
from spec.events import TENSORS

_TENSOR_KEY = struct.Struct(">hiqihihiiii")  # 7 columns, 8 run, 2 kind, 2 level, 4 bucket, 4 n


def close(run_id: int, width: int, fresh: Steps, previous_last: int, last: int) -> None:
    """Writes the roll-ups of buckets that `fresh`, just stored, has ended or changed. `last` is the run's last step now, `previous_last` before."""
    touched = np.union1d(bucket_of(fresh.step, LEVELS[0]), bucket_of(np.array([previous_last]), LEVELS[0]))
    present: list[str] | None = None
    for level in LEVELS:
        over = np.unique(touched)[(np.unique(touched) + 1) * level <= last]
        if not len(over):
            return
        memory = fresh if level == LEVELS[0] else None
        _write_scalars(run_id, level, over, _scalars(run_id, width, level, over, memory))
        if present is None:
            present = kinds(run_id)
        for kind in present:
            _write_tensors(run_id, kind, level, over, _tensors(run_id, kind, level, over, memory))
        touched = over // (16384 // 1024)


def rebuild(run_id: int, width: int, after: int, last: int) -> None:
    """Makes the roll-ups of all buckets that reach past step `after` anew, the run's last step being `last`."""
    with connection.cursor() as cursor:
        for table in ("scalarrollup", "tensorrollup"):
            cursor.execute(f"DELETE FROM experiments_{table} WHERE run_id = %s AND (bucket + 1) * level::bigint > %s", [run_id, after])  # noqa: S608
    if last > after:
        stored = rows.query("SELECT step FROM experiments_stepscalar WHERE run_id = %s AND step > %s ORDER BY step", [run_id, after])
        step = np.array([row[0] for row in stored], np.int64)
        close(run_id, width, Steps(step, np.zeros(len(step)), np.empty((len(step), 0), np.float32)), after, last)


def kinds(run_id: int) -> list[str]:
    """The kinds of tensors that the run has. One look-up in the index for each kind there can be."""
    found = rows.query(
        "SELECT code FROM unnest(%s::int[]) AS code WHERE EXISTS (SELECT FROM experiments_steptensor WHERE run_id = %s AND kind = code)",
        [[kind.code for kind in TENSORS.values()], run_id],
    )
    codes = {row[0] for row in found}
    return [name for name, kind in TENSORS.items() if kind.code in codes]


def _in_memory(fresh_step: NDArray[np.int64], over: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which fresh steps lie in buckets that are fresh as a whole, and which of `over` must be read from the store."""
    bucket = bucket_of(fresh_step, LEVELS[0])
    inside, counts = np.unique(bucket, return_counts=True)
    whole = inside[(counts >= LEVELS[0]) & (inside > 0)]  # Bucket 0 may also hold a step 0, stored before.
    return np.isin(bucket, np.intersect1d(whole, over)), np.setdiff1d(over, whole)


def _scalars(run_id: int, width: int, level: int, over: NDArray[np.int64], fresh: Steps | None) -> Scalars:
    finer = FINER[level]
    if fresh is None:
        low, high = _bounds(over, level, finer)
        below = rows.scalars(run_id, finer, low, high, width, over, level)
        return below.reduce(below.key // (level // finer))
    use, stored = _in_memory(fresh.step, over)
    if fresh.scalars.shape[1] != width:
        use, stored = np.zeros_like(use), over
    out = rows.of_steps(fresh.step[use], fresh.scalars[use])
    if len(stored):
        found = rows.scalars(run_id, 1, *_bounds(stored, level, 1), width, stored, level)
        out = _sorted(found.join(out)) if use.any() else found
    return out.reduce(bucket_of(out.key, level))


def _bounds(over: NDArray[np.int64], level: int, finer: int) -> tuple[int, int]:
    """The lowest and highest key of level `finer` that the buckets `over` of `level` span."""
    low, high = rows.first_step(int(over[0]), level), (int(over[-1]) + 1) * level
    return (low, high) if finer == 1 else (int(bucket_of(low, finer)), int(bucket_of(high, finer)))


def _sorted(scalars: Scalars) -> Scalars:
    order = np.argsort(scalars.key, kind="stable")
    return Scalars(*(column[order] for column in vars(scalars).values()))


def _tensors(run_id: int, kind: str, level: int, over: NDArray[np.int64], fresh: Steps | None) -> Tensors:
    finer = FINER[level]
    if fresh is None:
        below = rows.tensors(run_id, kind, finer, *_bounds(over, level, finer), buckets=over, of=level)
        return below.reduce(below.key // (level // finer))
    parts = [part for part in fresh.tensors if part.kind == kind]
    out, stored = rows.NO_TENSORS, over
    if len(parts) == 1:
        step = fresh.step[parts[0].rows]
        use, stored = _in_memory(step, over)
        out = Tensors(step[use], np.ones(int(use.sum()), np.int64), parts[0].values[use]).reduce(bucket_of(step[use], level))
    if len(stored):
        found = rows.tensors(run_id, kind, 1, *_bounds(stored, level, 1), buckets=stored, of=level)
        out = out.join(found.reduce(bucket_of(found.key, level)))
    return out


def _write_scalars(run_id: int, level: int, over: NDArray[np.int64], made: Scalars) -> None:
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM experiments_scalarrollup WHERE run_id = %s AND level = %s AND bucket = ANY(%s)", [run_id, level, over.tolist()])
        if not len(made):
            return
        columns = [("run", ">i8", run_id), ("level", ">i2", level), ("bucket", ">i4", made.key)]
        columns += [("n", ">i4", made.n), ("first", ">i4", made.first), ("last", ">i4", made.last)]
        arrays = [("mins", copy.FLOAT4, made.mins), ("maxs", copy.FLOAT4, made.maxs)]
        arrays += [("sums", copy.FLOAT8, made.sums), ("counts", copy.INT4, made.counts)]
        names = "run_id, level, bucket, n, first_step, last_step, mins, maxs, sums, counts"
        copy.into(cursor, "scalarrollup", names, copy.table(columns, arrays, len(made)))


def _write_tensors(run_id: int, kind: str, level: int, over: NDArray[np.int64], made: Tensors) -> None:
    code = TENSORS[kind].code
    with connection.cursor() as cursor:
        cursor.execute(
            "DELETE FROM experiments_tensorrollup WHERE run_id = %s AND kind = %s AND level = %s AND bucket = ANY(%s)",
            [run_id, code, level, over.tolist()],
        )
        if not len(made):
            return
        keys = [(7, 8, run_id, 2, code, 2, level, 4, bucket, 4, n) for bucket, n in zip(made.key.tolist(), made.n.tolist(), strict=True)]
        packed = payload.encode_rows(payload.exact_sums(made.sums))
        names = "run_id, kind, level, bucket, n, shape, payload"
        copy.into(cursor, "tensorrollup", names, copy.tensor_rows(_TENSOR_KEY, keys, made.sums.shape[1:], packed))
