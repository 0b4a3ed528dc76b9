"""From the step to the browser: a real web process, 20 viewers' WebSockets, an ingest socket at 20 steps a second.

    python -m benchmarks live_latency [--viewers 20] [--rate 20] [--seconds 20]

The time runs from the send of a step's frame on the ingest socket to its receipt by each viewer: the way through
checksum, PostgreSQL's commit, Valkey and the fan-out. Sender and viewers share one process and this machine's cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from benchmarks import service
from spec import block, events


def main(argv: Sequence[str] = ()) -> dict[str, Any]:
    """{"p50_ms", "p99_ms", "viewers", …}"""
    parser = argparse.ArgumentParser(prog="python -m benchmarks live_latency")
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--rate", type=float, default=20.0, help="steps a second")
    parser.add_argument("--seconds", type=float, default=20.0)
    asked = parser.parse_args(argv)
    with service.database() as home:
        run = service.make_run()
        token = _token(run.owner)
        with service.web(home) as address:
            return asyncio.run(_measure(address, run.pk, token, asked.viewers, asked.rate, asked.seconds))


def _token(user: Any) -> str:
    from experiments import secret
    from experiments.models import Token

    value = "mlk_benchmark"
    Token.objects.create(user=user, name="viewer", prefix=value[:8], sha256=secret.digest(value), scopes=["read"])
    return value


async def _measure(address: str, run_id: int, token: str, viewers: int, rate: float, seconds: float) -> dict[str, Any]:
    sent: dict[int, float] = {}
    seen: list[tuple[int, float]] = []
    steps = int(rate * seconds)
    ready = asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as group:
        for _ in range(viewers):
            group.create_task(_view(address, run_id, token, steps, seen, ready))
        for _ in range(viewers):
            await ready.acquire()
        await _send(address, run_id, steps, rate, sent)
    delays = np.array([(at - sent[step]) * 1000 for step, at in seen if step > rate])
    p50, p99 = (round(float(np.percentile(delays, percent)), 1) for percent in (50, 99))
    expected = viewers * steps
    return {"p50_ms": p50, "p99_ms": p99, "viewers": viewers, "max_ms": round(float(delays.max()), 1), "delivered": len(seen), "expected": expected}


async def _view(address: str, run_id: int, token: str, steps: int, seen: list[tuple[int, float]], ready: asyncio.Semaphore) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    async with connect(f"ws://{address}/ws/runs/{run_id}/?after=0", additional_headers=headers, max_size=None) as socket:
        await socket.recv()
        ready.release()
        while True:
            message = await asyncio.wait_for(socket.recv(), 30)
            if isinstance(message, bytes):
                now = time.perf_counter()
                numbers = block.decode(message)[1]["step"].tolist()
                seen += [(number, now) for number in numbers]
                if numbers[-1] >= steps:
                    return


async def _send(address: str, run_id: int, steps: int, rate: float, sent: dict[int, float]) -> None:
    headers = {"Authorization": f"Bearer {service.RUN_TOKEN}"}
    counts = service.counts(64)
    scalars = np.random.default_rng(1).random((64, service.SCALARS), np.float32)
    async with connect(f"ws://{address}/ws/ingest/{run_id}/?attempt=1", additional_headers=headers) as socket:
        await socket.recv()
        await socket.send(_frame(service.opening()))
        acknowledged = asyncio.create_task(_read_until_acknowledged(socket, steps + len(service.opening())))
        begin = time.perf_counter()
        for number in range(1, steps + 1):
            await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
            step = events.StepDone(number, time.time(), scalars[number % 64], {"expert_tokens": counts[number % 64]})
            frame = _frame([step])
            sent[number] = time.perf_counter()
            await socket.send(frame)
            if number % 60 == 0:
                await socket.send('{"type":"heartbeat"}')
        await acknowledged


async def _read_until_acknowledged(socket: ClientConnection, seq: int) -> None:
    async for message in socket:
        if json.loads(message).get("seq") == seq:
            return


def _frame(said: list[Any]) -> bytes:
    payloads = [events.encode(event) for event in said]
    return b"E" + struct.pack("<I", 1) + b"".join(struct.pack("<II", len(data), zlib.crc32(data)) + data for data in payloads)
