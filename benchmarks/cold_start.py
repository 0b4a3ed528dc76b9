"""From `moelab demo` to the first training step in the store, and the memory of everything: `python -m benchmarks cold_start`.

Each sample is a whole start in a directory of its own kind: the first in an empty MOELAB_HOME (database and corpus are
made), the others in the same one again. `rss_mb` sums the resident memory of every process at the first step (shared
pages count once for each process, so it is an upper bound).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from moelab.client import Client, ServerUnreachable


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """{first_step_s (median of warm starts), first_step_empty_home_s, rss_mb, samples}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cold_start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="warm starts (default %(default)s)")
    parser.add_argument("--preset", default="nano-mixtral")
    args = parser.parse_args(arguments)
    home = Path(tempfile.mkdtemp(prefix="moelab-cold-"))
    home.chmod(0o755)
    try:
        empty_s, _ = _start(home, args.preset)
        warm = [_start(home, args.preset) for _ in range(args.repeats)]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return {
        "first_step_s": round(statistics.median(seconds for seconds, _ in warm), 2),
        "first_step_empty_home_s": round(empty_s, 2),
        "rss_mb": round(statistics.median(rss for _, rss in warm)),
        "samples": [round(seconds, 2) for seconds, _ in warm],
    }


def _start(home: Path, preset: str) -> tuple[float, float]:
    """One `moelab demo` up to its first step: (seconds, MB); the run is cancelled and everything is stopped again."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DATABASE_URL", "REDIS_URL")} | {"MOELAB_HOME": str(home)}
    connection = home / "client.json"
    before = connection.stat().st_mtime_ns if connection.exists() else 0
    started = time.monotonic()
    demo = subprocess.Popen(
        [sys.executable, "-m", "moelab.cli", "demo", "--preset", preset, "--port", "8700"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while time.monotonic() - started < 180 and demo.poll() is None:
            time.sleep(0.05)
            if not connection.exists() or connection.stat().st_mtime_ns == before:
                continue
            client = Client(**json.loads(connection.read_text()))
            with contextlib.suppress(ServerUnreachable):
                newest = next(iter(client.runs()), None)
                if newest and newest["state"] == "running" and newest["last_step"] >= 1:
                    seconds, rss_mb = time.monotonic() - started, _rss_mb(demo.pid, home)
                    client.cancel(newest["id"])
                    client.wait(newest["id"], timeout_s=30)
                    return seconds, rss_mb
        raise RuntimeError(f"no step within 180 s; the logs are in {home / 'log'}")
    finally:
        demo.send_signal(signal.SIGINT)
        demo.wait(60)


def _rss_mb(root: int, home: Path) -> float:
    """Resident memory of the process tree under `root` and of the detached supervisors that work in `home`, in MB."""
    roots = [psutil.Process(root)]
    for process in psutil.process_iter(["cmdline"]):
        if "workers.supervisor" in (process.info["cmdline"] or []) and str(home) in " ".join(process.info["cmdline"]):
            roots.append(process)
    total = 0
    for process in {member for top in roots for member in (top, *top.children(recursive=True))}:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 1e6
