"""Time on a CUDA device: works take turns, so that they meet the same clocks; times are medians of CUDA events."""

from __future__ import annotations

import math
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Work = Callable[[], object]
WARM_UP, ROUNDS, FEWEST_ROUNDS = 3, 20, 5
LEAST_S = 2.0  # for a work to get ready


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what runs longer, as a search for the best tiles may; in the main thread of a process alone. `inf`: no limit."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    usual = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds if math.isfinite(seconds) else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)


def measure(works: Mapping[str, tuple[Work, int]], until: float = float("inf"), rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Name to the median, fastest and slowest milliseconds of its work, and TFLOP/s where its FLOPs are not 0; `error` for what fails.

    After `until` (of `time.monotonic`) no new round begins, but FEWEST_ROUNDS are made. First calls, which compile and search, have two thirds of
    the time until then together, and each of them at most half of what is left of it.
    """
    failed: dict[str, dict[str, Any]] = {}
    now = time.monotonic()
    prepared = now + (until - now) * 2 / 3
    for name, (work, _) in works.items():
        try:
            # On threads of its own a backward pass would let no alarm through before its end.
            with at_most(max((prepared - time.monotonic()) / 2, LEAST_S)), torch.autograd.set_multithreading_enabled(False):
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
