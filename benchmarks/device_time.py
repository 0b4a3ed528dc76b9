"""Time on a CUDA device: works take turns, so that they meet the same clocks; times are medians of CUDA events."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Work = Callable[[], object]
WARM_UP, ROUNDS, FEWEST_ROUNDS = 3, 20, 5


def measure(works: Mapping[str, tuple[Work, int]], until: float = float("inf"), rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Name to the median, fastest and slowest milliseconds of its work, and TFLOP/s where its FLOPs are not 0; `error` for what fails.

    After `until` (of `time.monotonic`) no new round begins, but FEWEST_ROUNDS are made.
    """
    failed: dict[str, dict[str, Any]] = {}
    for name, (work, _) in works.items():
        try:
            for _round in range(WARM_UP):
                work()
            torch.cuda.synchronize()
        except Exception as error:  # a peer's own failure is a figure too; who calls looks at ours
            failed[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            torch.cuda.empty_cache()
    running = {name: entry for name, entry in works.items() if name not in failed}
    times_ms: dict[str, list[float]] = {name: [] for name in running}
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() > until:
            break
        events = {}
        for name, (work, _) in running.items():
            events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[name][0].record()
            work()
            events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times_ms[name].append(start.elapsed_time(end))
    return {name: _figures(times_ms[name], flops) for name, (_, flops) in running.items()} | failed


def _figures(times_ms: list[float], flops: int) -> dict[str, Any]:
    median_ms = statistics.median(times_ms)
    figures: dict[str, Any] = {"median_ms": median_ms, "fastest_ms": min(times_ms), "slowest_ms": max(times_ms), "rounds": len(times_ms)}
    return figures | ({"tflops_per_s": flops / median_ms / 1e9} if flops else {})


def smi(*fields: str) -> dict[str, str]:
    """What `nvidia-smi` says of the first device, by field; "unknown" without it."""
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return dict.fromkeys(fields, "unknown")
    return dict(zip(fields, line.split(", "), strict=True))


def clocks() -> dict[str, str]:
    """The device's clocks, power and temperature now."""
    return smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
