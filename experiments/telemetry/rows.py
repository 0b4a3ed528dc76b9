"""Rows of the store as arrays: fetched at one level, and reduced to a coarser one.

Level 1 is the steps themselves. A row of Scalars or Tensors stands for `n` steps; at level 1 for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
from django.db import connection
from numpy.typing import NDArray

from experiments.telemetry import payload
from spec.events import TENSORS

Array = NDArray[Any]
LEVELS = (64, 1024, 16384)
FINER = {64: 1, 1024: 64, 16384: 1024}


def bucket_of(step: Any, level: int) -> Any:
    """The bucket of `step` (a number or an array) at `level`; step 0, which outside trainers may have, counts with step 1."""
    return np.maximum(step - 1, 0) // level


def first_step(bucket: int, level: int) -> int:
    """The lowest step that `bucket` can hold."""
    return bucket * level + 1 if bucket else 0


def query(sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows in PostgreSQL's binary format, on Django's connection and in its transaction."""
    connection.ensure_connection()
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        return cursor.execute(sql, parameters, binary=True).fetchall()


def execute(sql: str, parameters: Sequence[Any]) -> None:
    """A statement without an answer, likewise."""
    connection.ensure_connection()
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        cursor.execute(sql, parameters)


@dataclass(frozen=True)
class Scalars:
    """N rows of S scalars: `mins`, `maxs` float32[N, S] (NaN where no step had a value), `sums` float64, `counts` int64.

    All four leave out values that are NaN.
    """

    key: NDArray[np.int64]
    n: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    mins: Array
    maxs: Array
    sums: Array
    counts: Array

    def __len__(self) -> int:
        return len(self.key)

    @property
    def means(self) -> Array:
        """float32[N, S]; NaN where no step had a value."""
        with np.errstate(invalid="ignore"):
            return (np.where(self.counts, self.sums, np.nan) / np.maximum(self.counts, 1)).astype(np.float32)

    def join(self, other: Scalars) -> Scalars:
        """These rows and then the `other`'s."""
        return Scalars(*(np.concatenate([mine, theirs]) for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def reduce(self, keys: NDArray[np.int64]) -> Scalars:
        """One row for each distinct value of `keys` (int64[N], rising), over the rows that have it."""
        unique, start = np.unique(keys, return_index=True)
        if not len(unique):
            return self
        return Scalars(
            unique,
            np.add.reduceat(self.n, start),
            np.minimum.reduceat(self.first, start),
            np.maximum.reduceat(self.last, start),
            np.fmin.reduceat(self.mins, start, axis=0),
            np.fmax.reduceat(self.maxs, start, axis=0),
            np.add.reduceat(self.sums, start, axis=0),
            np.add.reduceat(self.counts, start, axis=0),
        )


def of_steps(step: NDArray[np.int64], vals: NDArray[np.float32]) -> Scalars:
    """Rows of single steps."""
    known = ~np.isnan(vals)
    return Scalars(step, np.ones_like(step), step, step, vals, vals, np.where(known, vals, 0).astype(np.float64), known.astype(np.int64))


@dataclass(frozen=True)
class Tensors:
    """N rows of one kind: `sums` [N, *shape] over the `n` steps that had it. `key` is the step or the bucket."""

    key: NDArray[np.int64]
    n: NDArray[np.int64]
    sums: Array

    def __len__(self) -> int:
        return len(self.key)

    def join(self, other: Tensors) -> Tensors:
        """These rows and then the `other`'s; where the shapes differ (another number of ranks), the smaller are filled up with zeros."""
        if not len(self) or not len(other):
            return other if not len(self) else self
        shape = tuple(max(pair) for pair in zip(self.sums.shape[1:], other.sums.shape[1:], strict=True))
        sums = np.concatenate([fit(self.sums, shape), fit(other.sums, shape)])
        return Tensors(np.concatenate([self.key, other.key]), np.concatenate([self.n, other.n]), sums)

    def reduce(self, keys: NDArray[np.int64]) -> Tensors:
        """One row, of float64 sums, for each distinct value of `keys` (int64[N], rising)."""
        unique, start = np.unique(keys, return_index=True)
        if not len(unique):
            return self
        return Tensors(unique, np.add.reduceat(self.n, start), np.add.reduceat(self.sums, start, axis=0, dtype=np.float64))


def fit(values: Array, shape: tuple[int, ...]) -> Array:
    """`values` [N, …] with zeros behind, so that each row has `shape`."""
    if values.shape[1:] == shape:
        return values
    out = np.zeros((len(values), *shape), values.dtype)
    out[(slice(None), *(slice(0, size) for size in values.shape[1:]))] = values
    return out


NO_TENSORS = Tensors(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 0), np.float64))


def _ints(column: Sequence[int]) -> NDArray[np.int64]:
    return np.array(column, np.int64)


def matrix(column: Sequence[bytes], width: int, dtype: str) -> Array:
    """array_send's bytes as [N, width]; rows written when the run had fewer names end in NaN (integers: 0)."""
    element = np.dtype([("length", ">i4"), ("value", dtype)])
    native = np.dtype(dtype).newbyteorder("=")
    out = np.full((len(column), width), np.nan if native.kind == "f" else 0, native)
    for size in {len(row) for row in column}:
        rows = [i for i, row in enumerate(column) if len(row) == size]
        stored = min((size - 20) // element.itemsize, width) if size > 12 else 0
        if stored:
            joined = np.frombuffer(b"".join([column[i] for i in rows]), np.uint8).reshape(len(rows), size)
            values = np.ascontiguousarray(joined[:, 20 : 20 + stored * element.itemsize]).view(element)["value"]
            out[rows, :stored] = values
    return out


def scalars(run_id: int, level: int, low: int, high: int, width: int, buckets: NDArray[np.int64] | None = None, of: int = 1) -> Scalars:
    """The run's rows at `level` whose key (step or bucket) is in low … high; with `buckets`, only those in these buckets of level `of`."""
    if level == 1:
        sql = "SELECT step, array_send(vals) FROM experiments_stepscalar WHERE run_id = %s AND step BETWEEN %s AND %s"
        parameters: list[Any] = [run_id, low, high]
        if buckets is not None:
            sql += " AND GREATEST(step - 1, 0) / %s = ANY(%s)"
            parameters += [of, buckets.tolist()]
        found = query(sql + " ORDER BY step", parameters)
        return of_steps(_ints([row[0] for row in found]), matrix([row[1] for row in found], width, ">f4"))
    sql = (
        "SELECT bucket, n, first_step, last_step, array_send(mins), array_send(maxs), array_send(sums), array_send(counts)"
        " FROM experiments_scalarrollup WHERE run_id = %s AND level = %s AND bucket BETWEEN %s AND %s"
    )
    parameters = [run_id, level, low, high]
    if buckets is not None:
        sql += " AND bucket / %s = ANY(%s)"
        parameters += [of // level, buckets.tolist()]
    columns = list(zip(*query(sql + " ORDER BY bucket", parameters), strict=True)) or [()] * 8
    key, n, first, last = (_ints(column) for column in columns[:4])
    kinds = (">f4", ">f4", ">f8", ">i4")
    mins, maxs, sums, counts = (matrix(column, width, kind) for column, kind in zip(columns[4:], kinds, strict=True))
    return Scalars(key, n, first, last, mins, maxs, sums, counts.astype(np.int64))


def tensors(
    run_id: int, kind: str, level: int, low: int, high: int, *, layer: int | None = None, buckets: NDArray[np.int64] | None = None, of: int = 1
) -> Tensors:
    """The run's tensors of `kind` at `level`, as `scalars` has it. `layer` keeps one row of the first axis (its length is then 1)."""
    code = TENSORS[kind].code
    if level == 1:
        sql = "SELECT step, 1, shape, payload FROM experiments_steptensor WHERE run_id = %s AND kind = %s AND step BETWEEN %s AND %s"
        parameters: list[Any] = [run_id, code, low, high]
        if buckets is not None:
            sql += " AND GREATEST(step - 1, 0) / %s = ANY(%s)"
            parameters += [of, buckets.tolist()]
        sql += " ORDER BY step"
    else:
        sql = (
            "SELECT bucket, n, shape, payload FROM experiments_tensorrollup"
            " WHERE run_id = %s AND kind = %s AND level = %s AND bucket BETWEEN %s AND %s"
        )
        parameters = [run_id, code, level, low, high]
        if buckets is not None:
            sql += " AND bucket / %s = ANY(%s)"
            parameters += [of // level, buckets.tolist()]
        sql += " ORDER BY bucket"
    return _unpack(query(sql, parameters), layer)


def shapes(run_id: int, kinds: Sequence[str], level: int, low: int, high: int) -> set[tuple[str, tuple[int, ...]]]:
    """Kind and shape of the run's tensors of these `kinds` whose key (step or bucket) is in low … high at `level`."""
    names = {TENSORS[kind].code: kind for kind in kinds}
    if not names:
        return set()
    table, key, at = ("steptensor", "step", "") if level == 1 else ("tensorrollup", "bucket", f" AND level = {level:d}")
    sql = f"SELECT DISTINCT kind, shape FROM experiments_{table} WHERE run_id = %s AND kind = ANY(%s) AND {key} BETWEEN %s AND %s{at}"  # noqa: S608
    parameters = [run_id, list(names), low, high]
    return {(names[row[0]], tuple(row[1])) for row in query(sql, parameters)}


def _unpack(found: Sequence[tuple[Any, ...]], layer: int | None) -> Tensors:
    out, start = NO_TENSORS, 0
    while start < len(found):
        shape = tuple(found[start][2])
        end = start
        while end < len(found) and tuple(found[end][2]) == shape:
            end += 1
        rows = found[start:end]
        start = end
        part, kept = None, shape
        if layer is not None and len(shape) and shape[0] > layer:
            cells = int(np.prod(shape[1:]))
            part, kept = slice(layer * cells, (layer + 1) * cells), (1, *shape[1:])
        elif layer is not None:
            continue
        values = payload.decode_rows([row[3] for row in rows], int(np.prod(shape)), part).reshape(len(rows), *kept)
        out = out.join(Tensors(_ints([row[0] for row in rows]), _ints([row[1] for row in rows]), values))
    return out
