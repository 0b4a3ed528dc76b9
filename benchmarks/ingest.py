"""How many steps a second one writer can store: 20 scalars and the counts of 16 layers x 64 experts, roll-ups included.

    python -m benchmarks ingest [--steps 40000] [--frame 400]

Frames as the socket delivers them go through the session of the ingest socket: checksums, decoding, COPY into a durable
PostgreSQL, three levels of roll-ups, and the word to viewers.
"""

from __future__ import annotations

import argparse
import struct
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import service
from spec import events


def main(argv: Sequence[str] = ()) -> dict[str, Any]:
    """{"steps_per_s", "bytes_per_step", …}"""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ingest")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--frame", type=int, default=400, help="steps in one frame")
    asked = parser.parse_args(argv)
    with service.database():
        return _measure(asked.steps, asked.frame)


def _measure(steps: int, per_frame: int) -> dict[str, Any]:
    from experiments.actions.attempt import authenticate_ingest
    from experiments.ingest.session import Session

    run = service.make_run()
    grant = authenticate_ingest(run.pk, 1, service.RUN_TOKEN)
    assert grant is not None
    session = Session(grant)
    session.hello()
    session.binary(_frame(service.opening()))
    counts = service.counts(512)
    scalars = np.random.default_rng(1).random((512, service.SCALARS), np.float32)

    def step(number: int) -> events.StepDone:
        return events.StepDone(number, 1.7e9 + number, scalars[number % 512], {"expert_tokens": counts[number % 512]})

    spent = 0.0
    for first in range(1, steps + 1, per_frame):
        frame = _frame([step(number) for number in range(first, min(first + per_frame, steps + 1))])
        start = time.perf_counter()
        session.binary(frame)
        spent += time.perf_counter() - start
    return {"steps_per_s": round(steps / spent), "bytes_per_step": round(_bytes() / steps), "steps": steps, "steps_per_frame": per_frame}


def _frame(said: list[Any]) -> bytes:
    payloads = [events.encode(event) for event in said]
    return b"E" + struct.pack("<I", 1) + b"".join(struct.pack("<II", len(data), zlib.crc32(data)) + data for data in payloads)


def _bytes() -> int:
    """Size on disk of all telemetry: tables, indexes and TOAST."""
    from experiments.telemetry.rows import query

    tables = ["stepscalar", "steptensor", "scalarrollup", "tensorrollup"]
    found = query("SELECT sum(pg_total_relation_size(('experiments_' || t)::regclass)) FROM unnest(%s::text[]) t", [tables])
    return int(found[0][0])
