"""Rows for PostgreSQL's binary COPY, built from arrays without a loop over numbers.

The format: int16 number of columns, then int32 length and bytes of each; big-endian. An array is int32 dimensions, flags,
element type, then per dimension int32 length and lower bound, then int32 length and bytes of each element.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from django.db import connection
from numpy.typing import NDArray

from experiments.telemetry.batch import Steps

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
FLOAT4, FLOAT8, INT4 = 700, 701, 23
_EPOCH = 946_684_800  # 2000-01-01, where PostgreSQL's clock starts
_ELEMENT = {FLOAT4: ">f4", FLOAT8: ">f8", INT4: ">i4"}


def microseconds(at: NDArray[np.float64]) -> NDArray[np.int64]:
    """Unix seconds as PostgreSQL's timestamptz."""
    return np.round((at - _EPOCH) * 1e6).astype(np.int64)


def _matrix(name: str, oid: int, width: int) -> list[tuple[Any, ...]]:
    """The fields of a one-dimensional array column of `width` elements, as numpy's structured dtype has them."""
    return [
        (f"{name}_bytes", ">i4"),
        (f"{name}_head", ">i4", (5 if width else 3,)),
        (name, [("len", ">i4"), ("value", _ELEMENT[oid])], (width,)),
    ]


def _fill(table: NDArray[Any], name: str, oid: int, values: NDArray[Any]) -> None:
    size = np.dtype(_ELEMENT[oid]).itemsize
    width = values.shape[1]
    table[f"{name}_head"] = (1, 0, oid, width, 1) if width else (0, 0, oid)
    table[f"{name}_bytes"] = (20 + width * (4 + size)) if width else 12
    table[name]["len"] = size
    table[name]["value"] = values


def table(columns: Sequence[tuple[str, str, Any]], arrays: Sequence[tuple[str, int, NDArray[Any]]], n: int) -> bytes:
    """COPY's rows of fixed-size `columns` (name, numpy type, value or values[n]) followed by `arrays` (name, element type, [n, width])."""
    fields: list[tuple[Any, ...]] = [("n_columns", ">i2")]
    for name, kind, _ in columns:
        fields += [(f"{name}_bytes", ">i4"), (name, kind)]
    for name, oid, values in arrays:
        fields += _matrix(name, oid, values.shape[1])
    rows = np.zeros(n, np.dtype(fields))
    rows["n_columns"] = len(columns) + len(arrays)
    for name, kind, values in columns:
        rows[f"{name}_bytes"] = np.dtype(kind).itemsize
        rows[name] = values
    for name, oid, values in arrays:
        _fill(rows, name, oid, values)
    return rows.tobytes()


def scalar_rows(run_id: int, attempt: int, steps: Steps) -> bytes:
    """Rows of (run_id, step, at, attempt, vals)."""
    columns = [("run", ">i8", run_id), ("step", ">i4", steps.step), ("at", ">i8", microseconds(steps.at)), ("attempt", ">i4", attempt)]
    return table(columns, [("vals", FLOAT4, steps.scalars)], len(steps))


def tensor_rows(leading: struct.Struct, keys: Sequence[tuple[Any, ...]], shape: Sequence[int], payloads: Sequence[bytes]) -> bytes:
    """Rows of the columns that `leading` packs from each of `keys`, then `shape` int4[] and `payload`."""
    dimensions = struct.pack(">iiiiiii", 20 + 8 * len(shape), 1, 0, INT4, len(shape), 1, 4)
    dimensions += struct.pack(">" + "ii" * (len(shape) - 1) + "i", *(part for n in shape[:-1] for part in (n, 4)), shape[-1])
    length = struct.Struct(">i").pack
    return b"".join([part for key, data in zip(keys, payloads, strict=True) for part in (leading.pack(*key), dimensions, length(len(data)), data)])


# The constants between the values are the numbers of columns and the lengths that COPY wants before each value.
STEP_TENSOR = struct.Struct(">hiqihii")  # 5, 8 run, 2 kind, 4 step
ARCHIVED_TENSOR = struct.Struct(">hiqiiihii")  # 6, 8 run, 4 attempt, 2 kind, 4 step


def into(cursor: Any, table_name: str, columns: str, data: bytes) -> None:
    """Copies rows into a table of this app."""
    with connection.wrap_database_errors, cursor.copy(f"COPY experiments_{table_name} ({columns}) FROM STDIN (FORMAT BINARY)") as stream:
        stream.write(HEADER + data + TRAILER)
