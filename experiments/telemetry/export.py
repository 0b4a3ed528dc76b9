"""Everything a run has said, as files other programs read: streamed in pieces of a few thousand steps, never held as a whole."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from experiments.telemetry import log, read, rows
from experiments.telemetry.read import Facts

STEPS_AT_ONCE = 5000
CELLS_AT_ONCE = 4_000_000
LOG_BYTES_AT_ONCE = 1_000_000
ROUTING = ("expert_tokens", "dropped")


class _Pipe(io.RawIOBase):
    """A file to write to whose bytes are taken away as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


class _Steps:
    """A stretch of steps: `step` int64[N], `at` datetimes[N], `attempt` [N], `vals` float32[N, S]."""

    def __init__(self, found: list[tuple[Any, ...]], width: int) -> None:
        self.step = [int(row[0]) for row in found]
        self.at: list[datetime] = [row[1] for row in found]
        self.attempt = [int(row[2]) for row in found]
        self.vals = rows.matrix([row[3] for row in found], width, ">f4")


def _stretches(facts: Facts) -> Iterator[_Steps]:
    after = -1
    sql = (
        "SELECT step, at, attempt, array_send(vals) FROM experiments_stepscalar WHERE run_id = %s AND step > %s AND step <= %s ORDER BY step LIMIT %s"
    )
    while found := rows.query(sql, [facts.run_id, after, facts.last, STEPS_AT_ONCE]):
        yield _Steps(found, len(facts.names))
        after = found[-1][0]


def metrics_csv(facts: Facts) -> Iterator[bytes]:
    """Step, time, attempt and a column for each metric; empty where it is not known."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", "at", "attempt", *(_plain(name) for name in facts.names)])
    for part in _stretches(facts):
        for step, at, attempt, vals in zip(part.step, part.at, part.attempt, part.vals.tolist(), strict=True):
            writer.writerow([step, at.isoformat(), attempt, *("" if value != value else value for value in vals)])
        yield text.getvalue().encode()
        text.seek(0)
        text.truncate()
    yield text.getvalue().encode()


def _plain(name: str) -> str:
    """A metric's name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in "=+-@\t\r" else name


def metrics_jsonl(facts: Facts) -> Iterator[bytes]:
    """An object for each step; null where a metric is not a finite number."""
    for part in _stretches(facts):
        finite = np.isfinite(part.vals)
        lines = []
        for i, vals in enumerate(part.vals.tolist()):
            known = {name: value if finite[i, j] else None for j, (name, value) in enumerate(zip(facts.names, vals, strict=True))}
            lines.append(json.dumps({"step": part.step[i], "at": part.at[i].isoformat(), "attempt": part.attempt[i], "metrics": known}))
        yield ("\n".join(lines) + "\n").encode()


def metrics_parquet(facts: Facts) -> Iterator[bytes]:
    """Columns step, at, attempt and one for each metric."""
    fixed = [("step", pa.int32()), ("at", pa.timestamp("us", "UTC")), ("attempt", pa.int32())]
    schema = pa.schema([*fixed, *((f"metrics/{name}", pa.float32()) for name in facts.names)])

    def tables() -> Iterator[pa.Table]:
        for part in _stretches(facts):
            columns = [pa.array(part.step, pa.int32()), pa.array(part.at, fixed[1][1]), pa.array(part.attempt, pa.int32())]
            yield pa.Table.from_arrays([*columns, *(pa.array(column) for column in part.vals.T)], schema=schema)

    yield from _parquet(schema, tables())


def _parquet(schema: pa.Schema, tables: Iterator[pa.Table]) -> Iterator[bytes]:
    pipe = _Pipe()
    with pq.ParquetWriter(pipe, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            yield pipe.take()
    yield pipe.take()


def _routing(facts: Facts) -> Iterator[tuple[NDArray[np.int64], Mapping[str, NDArray[Any]]]]:
    """Steps and their [n, L, E] counts, of all steps that have expert_tokens."""
    cells = max(1, len(facts.moe_layers) * facts.n_experts)
    width = max(1, min(STEPS_AT_ONCE, CELLS_AT_ONCE // cells))
    for low in range(0, facts.last + 1, width):
        high = min(low + width - 1, facts.last)
        found = {kind: read.tensors(facts, kind, 1, low, high) for kind in ROUTING}
        tokens = found["expert_tokens"]
        if not len(tokens):
            continue
        dropped = np.zeros(tokens.sums.shape, np.uint32)
        _, to, frm = np.intersect1d(tokens.key, found["dropped"].key, return_indices=True)
        if len(to):
            dropped[to] = found["dropped"].sums[frm]
        yield tokens.key, {"expert_tokens": tokens.sums, "dropped": dropped}


def routing_parquet(facts: Facts) -> Iterator[bytes]:
    """A row for each step and MoE layer: step, layer (its index in the model), expert_tokens and dropped as lists over the experts."""
    counts = pa.list_(pa.uint32())
    schema = pa.schema([("step", pa.int32()), ("layer", pa.int32()), ("expert_tokens", counts), ("dropped", counts)])

    def tables() -> Iterator[pa.Table]:
        for step, arrays in _routing(facts):
            n, n_layers, n_experts = arrays["expert_tokens"].shape
            layers = [*facts.moe_layers, *range(len(facts.moe_layers), n_layers)][:n_layers]
            offsets = pa.array(np.arange(n * n_layers + 1, dtype=np.int32) * n_experts)
            lists = [pa.ListArray.from_arrays(offsets, pa.array(arrays[kind].reshape(-1))) for kind in ROUTING]
            columns = [pa.array(np.repeat(step, n_layers).astype(np.int32)), pa.array(np.tile(np.array(layers, np.int32), n)), *lists]
            yield pa.Table.from_arrays(columns, schema=schema)

    yield from _parquet(schema, tables())


def routing_npz(facts: Facts) -> Iterator[bytes]:
    """What numpy.load reads: step [N], moe_layers [L], expert_tokens and dropped [N, L, E]."""
    found = rows.query(
        "SELECT step, shape FROM experiments_steptensor WHERE run_id = %s AND kind = 1 AND step <= %s ORDER BY step", [facts.run_id, facts.last]
    )
    step = np.array([row[0] for row in found], np.int64)
    shape = tuple(np.max([row[1] for row in found], axis=0).tolist()) if found else (len(facts.moe_layers), facts.n_experts)
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in (("step", step), ("moe_layers", np.array(facts.moe_layers, np.int64))):
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        for kind in ROUTING:
            with archive.open(f"{kind}.npy", "w", force_zip64=True) as file:
                header = {"descr": "<u4", "fortran_order": False, "shape": (len(step), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                written = 0
                for key, arrays in _routing(facts):
                    whole = np.zeros((int(np.searchsorted(step, key[-1], "right")) - written, *shape), np.uint32)
                    whole[np.searchsorted(step, key) - written] = rows.fit(arrays[kind], shape)
                    file.write(whole.tobytes())
                    written += len(whole)
                    yield pipe.take()
                file.write(bytes((len(step) - written) * int(np.prod(shape)) * 4))
    yield pipe.take()


def log_text(facts: Facts) -> Iterator[bytes]:
    """What the run printed, all of it."""
    offset = 0
    while piece := log.read(facts.run_id, offset, LOG_BYTES_AT_ONCE):
        yield piece
        offset += len(piece)


FORMATS: Mapping[str, tuple[str, Callable[[Facts], Iterator[bytes]]]] = {
    "metrics.csv": ("text/csv; charset=utf-8", metrics_csv),
    "metrics.jsonl": ("application/jsonl", metrics_jsonl),
    "metrics.parquet": ("application/vnd.apache.parquet", metrics_parquet),
    "routing.parquet": ("application/vnd.apache.parquet", routing_parquet),
    "routing.npz": ("application/zip", routing_npz),
    "log.txt": ("text/plain; charset=utf-8", log_text),
}
