"""What needs a CUDA device, in one call under ten minutes: `make gpu` or `python -m benchmarks.gpu`. Prints one JSON object.

Numerics of every Triton operation against float64, determinism over 40 repeats, the layer in a CUDA graph, `benchmarks.kernels` and
`benchmarks.train_gpu`. Each part is a process of its own, so that one that crashes or hangs takes nothing else away: checks run side by side, as
they wait for the compiler more than for the device, and then what is timed runs alone. Needs torch, triton and numpy alone, but for the whole step,
which wants moelab with its extra `train`, and transformers; peers are measured where they are installed. The figures also go to
benchmarks/results/gpu-DATE-DEVICE.json. Exit code 1 where a check fails, 3 without a device. Triton is imported only where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
CHECKS_S, LAYERS_S, END_S = 200.0, 420.0, 575.0  # since the start: when checks, layers and the whole step are ended
START_S = 10.0  # what a process needs until it has its device, and again to be worth it
Part = Callable[[float], tuple[Any, list[str]]]  # of the seconds it has: figures, and what is not as it should be
OURS = (
    "router",
    "tiles",
    "up",
    "down",
    "combine",
    "hidden gradient",
    "input gradient",
    "weight gradient in",
    "weight gradient out",
)  # of the benchmark's parts


def checks() -> dict[str, Part]:
    """What is right or wrong."""
    from benchmarks import gpu_layer, gpu_repeats, gpu_routing

    found: dict[str, Part] = {}
    for dtype in gpu_layer.MOST:
        for shape in gpu_layer.SHAPES:
            name = f"numerics {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}"
            found[name] = partial(_untimed, partial(gpu_layer.numerics, "cuda", dtype, (shape,)))
    for dtype in gpu_routing.MOST_ROUTED:
        found[f"numerics router {str(dtype).removeprefix('torch.')}"] = partial(_untimed, partial(gpu_routing.router_numerics, "cuda", dtype))
    found["numerics tiles"] = partial(_untimed, partial(gpu_routing.sorting_numerics, "cuda"))
    return found | {"equal repeats": partial(_untimed, gpu_repeats.determinism), "graph": partial(_untimed, gpu_repeats.replay)}


def _untimed(work: Callable[[], tuple[Any, list[str]]], _seconds: float) -> tuple[Any, list[str]]:
    return work()


def layers() -> dict[str, Part]:
    """The layer of each shape against its peers."""
    from benchmarks.kernels import TARGETS

    return {f"layer {i}": partial(_layer, i) for i in range(len(TARGETS))}


def _layer(i: int, seconds: float) -> tuple[Any, list[str]]:
    from benchmarks.kernels import TARGETS, benchmark

    measured = benchmark(list(TARGETS)[i], "cuda", seconds)
    return measured, broken(measured)


def broken(measured: dict[str, Any]) -> list[str]:
    """What of ours did not run in the benchmark, or keeps too much; a peer may fail."""
    rows = [(name, row) for part in ("layers", "parts") for name, row in measured[part].items()]
    ours = [(name, row) for name, row in rows if name.startswith("triton ") or name in OURS]
    failed = [f"{name} of {measured['shape']}: {row['error']}" for name, row in ours if "error" in row]
    kept, most = measured["kept_bytes"].get("triton", 0), measured["most_kept_bytes"]
    return failed + ([f"triton of {measured['shape']} keeps {kept} bytes for the backward pass, more than {most}"] if kept > most else [])


def _training(seconds: float) -> tuple[Any, list[str]]:
    try:
        from benchmarks import train_gpu
    except ImportError as error:
        return {"skipped": str(error)}, []
    found = train_gpu.benchmark(seconds=seconds)
    return found, [f"training step: {found['errors']['ours']}"] if "ours" in found["errors"] else []


def parts() -> dict[str, Part]:
    """All there is to do, by name."""
    return checks() | layers() | {"training": _training}


def apart(name: str, until: float) -> tuple[Any, list[str]]:
    """A part in a process of its own, which is ended at `until` (of `time.monotonic`): its figures (None without) and failures."""
    seconds = until - time.monotonic()
    if seconds < 2 * START_S:
        return None, [f"{name}: not begun, no time was left"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as directory:
        out, errors = Path(directory) / "out", Path(directory) / "errors"
        child = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--seconds", f"{seconds - START_S:.0f}", "--out", str(out)]
        with errors.open("w") as heard:
            try:
                code = subprocess.run(child, stdout=heard, stderr=heard, env=environment, timeout=seconds).returncode
            except subprocess.TimeoutExpired:
                return None, [f"{name}: not done after {seconds:.0f} s"]
        if code or not out.exists():
            complaints = errors.read_text(errors="replace").strip().splitlines()
            return None, [f"{name}: exit code {code}: {complaints[-1] if complaints else 'without a word'}"[:500]]
        figures, failures = json.loads(out.read_text())
    return figures, failures


def versions() -> dict[str, Any]:
    """What the figures depend on: device, driver, the clocks it may have, torch and triton."""
    import triton

    from benchmarks.device_time import smi

    major, minor = torch.cuda.get_device_capability()
    found = {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", **smi("driver_version", "clocks.max.sm", "power.limit")}
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}


def collect(run: Callable[[str, float], tuple[Any, list[str]]] = apart) -> dict[str, Any]:
    """Every part's figures, the checks side by side and the rest one after the other, and all failures."""
    from benchmarks.gpu_repeats import REPEATS
    from benchmarks.kernels import TARGETS

    started = time.monotonic()
    found: dict[str, Any] = {}
    failures: list[str] = []

    def note(name: str, result: tuple[Any, list[str]]) -> None:
        found[name] = result[0]
        failures.extend(result[1])

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        running = {name: pool.submit(run, name, started + CHECKS_S) for name in checks()}
        for name, future in running.items():
            note(name, future.result())
    for left, name in zip(range(len(TARGETS), 0, -1), layers(), strict=True):
        now = time.monotonic()
        note(name, run(name, now + (started + LAYERS_S - now) / left))
    note("training", run("training", started + END_S))
    errors: dict[str, float] = {}
    for name, worst in found.items():
        for key, error in (worst or {}).items() if name.startswith("numerics ") else ():
            errors[key] = max(error, errors.get(key, 0.0))
    measured = [found[name] or {"shape": asdict(shape), "skipped": "see failures"} for name, shape in zip(layers(), TARGETS, strict=True)]
    peers: dict[str, str] = next((entry.pop("peers") for entry in measured if "peers" in entry), {})
    for entry in measured:
        entry.pop("peers", None)
    figures = {"failures": failures, "errors": errors, "graph": found["graph"], "repeats": REPEATS}
    figures |= {"equal_repeats": found["equal repeats"], "benchmark": {"peers": peers, "shapes": measured}}
    return figures | {"training": found["training"] or {"skipped": "see failures"}, "seconds": round(time.monotonic() - started, 1)}


def check() -> int:
    """Everything in order; the exit code."""
    if not torch.cuda.is_available():
        print("No CUDA device: these checks and figures need one. `make kernels-aot` compiles the kernels without.", file=sys.stderr)
        return 3
    date = time.strftime("%Y-%m-%d", time.gmtime())
    figures = {"date": date, "versions": versions(), **collect()}
    for line in figures["failures"]:
        print(line, file=sys.stderr)
    RESULTS.mkdir(exist_ok=True)
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    (RESULTS / f"gpu-{date}-{device}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return 1 if figures["failures"] else 0


def command(arguments: Sequence[str]) -> int:
    """All parts, or one of them in this process, which leaves its figures and failures as JSON in a file."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    options.add_argument("--part", help="of those that there are; with --out")
    options.add_argument("--seconds", type=float, default=120.0)
    options.add_argument("--out", type=Path)
    given = options.parse_args(arguments)
    if given.part is None:
        return check()
    given.out.write_text(json.dumps(parts()[given.part](given.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
