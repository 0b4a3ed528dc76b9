"""What this host can train on, found without loading torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import psutil


class Device(TypedDict):
    """One place for one rank. `index` counts within the kind, as in `cuda:0`."""

    kind: str
    index: int
    name: str
    memory_bytes: int


def devices(slots: int | None = None) -> list[Device]:
    """The CUDA devices that this process may see, then one CPU device for each slot."""
    cuda = _cuda()
    n_cpu = slots or max(1, len(cuda))
    memory = psutil.virtual_memory().total
    return [*cuda, *(Device(kind="cpu", index=index, name=_cpu_name(), memory_bytes=memory) for index in range(n_cpu))]


def slots(found: Iterable[Device]) -> int:
    """How many runs this host takes at once: MOELAB_SLOTS, else one for each CUDA device, else one. Raises ValueError."""
    given = os.environ.get("MOELAB_SLOTS")
    if given is None:
        return max(1, sum(device["kind"] == "cuda" for device in found))
    if not given.isdigit() or not 1 <= int(given) <= 1024:
        raise ValueError(f"MOELAB_SLOTS={given!r} is not a number from 1 to 1024")
    return int(given)


def label(device: Device) -> str:
    """Its name on the wire: `cuda:0`, `cpu:1`."""
    return f"{device['kind']}:{device['index']}"


def for_torch(device: str) -> str:
    """What torch calls the device of that label: there is only one `cpu`."""
    return "cpu" if device.startswith("cpu") else device


def _cuda() -> list[Device]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",") == 3]
    visible = _visible(rows)
    # torch counts the visible devices from 0, whatever the driver calls them.
    return [Device(kind="cuda", index=i, name=name, memory_bytes=_mebibytes(total)) for i, (_, _, name, total) in enumerate(visible)]


def _visible(rows: list[list[str]]) -> list[list[str]]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return rows
    found = []
    for wanted in (part.strip() for part in chosen.split(",")):
        row = next((row for row in rows if wanted and (row[0] == wanted or row[1].startswith(wanted))), None)
        if row is None:  # CUDA, too, stops at the first name that it does not know
            break
        found.append(row)
    return found


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdigit() else 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())
    return f"{named} ({os.cpu_count()} cores)"
