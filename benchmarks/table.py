"""README's table of figures, written from the records in benchmarks/results/: `python -m benchmarks table`.

The newest record of each kind counts; what no record has is marked as not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- written by `python -m benchmarks table` -->", "<!-- end -->"
NOT_MEASURED = "not measured yet"
Figures = Mapping[str, Any]


def newest(kind: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """The record of the latest day whose name begins with `kind` and a hyphen."""
    found = sorted(results.glob(f"{kind}-*.json"))
    return json.loads(found[-1].read_text()) if found else None


def _training(figures: Figures, precision: str) -> str:
    cases = [case for case in figures["train_cpu"]["cases"] if case["precision"] == precision]
    return ", ".join(f"{case['ratio']:.2f} ×" for case in cases)


CPU_ROWS: Sequence[tuple[str, Callable[[Figures], str]]] = (
    (
        "`moelab demo` to the first training step in the store, warm / empty home",
        lambda f: f"{f['cold_start']['first_step_s']:.1f} s / {f['cold_start']['first_step_empty_home_s']:.1f} s",
    ),
    (
        "a step's frame sent to 20 viewers' sockets, 20 steps a second",
        lambda f: f"p50 {f['live_latency']['p50_ms']:.0f} ms, p99 {f['live_latency']['p99_ms']:.0f} ms",
    ),
    (
        "ingest of steps with 20 scalars and 16 × 64 counts, roll-ups included",
        lambda f: f"{f['ingest']['steps_per_s']:,} steps/s, {f['ingest']['bytes_per_step'] / 1000:.1f} kB a step",
    ),
    (
        "any zoom of a run of 1,000,000 steps",
        lambda f: f"p50 {f['read_zoom']['p50_ms']:.1f} ms, p99 {f['read_zoom']['p99_ms']:.0f} ms",
    ),
    (
        "telemetry at every step, 16 layers × 64 experts, width 256: its own share of a step's time",
        lambda f: (
            f"{f['telemetry_overhead']['attributed_percent']:.2f} % (paired steps: "
            f"{f['telemetry_overhead']['percent']:.1f} ± {f['telemetry_overhead']['percent_error']:.1f} %)"
        ),
    ),
    (
        "training step against transformers' Mixtral (8 experts) and OLMoE (64), grouped_mm: float32",
        lambda f: f"{_training(f, 'float32')} its tokens/s",
    ),
    ("the same in bfloat16", lambda f: _training(f, "bfloat16")),
)


def gpu_rows(record: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Our layer's TFLOP/s and its ratio to the fastest other MoE layer, for every shape that `make gpu` measures."""
    from benchmarks.kernels import SHAPES

    measured = {json.dumps(entry["shape"], sort_keys=True): entry.get("layers", {}) for entry in record["benchmark"]["shapes"]} if record else {}
    for shape in SHAPES:
        size = f"T {shape.tokens}, d {shape.width}, n {shape.expert_width}, E {shape.experts}, K {shape.top_k}"
        layers = measured.get(json.dumps(vars(shape), sort_keys=True), {})
        figures = [_against_peers(layers, way) for way in ("forward", "forward+backward")]
        yield f"MoE layer on a GPU, {size}: forward; with backward", "; ".join(figures) if layers else NOT_MEASURED
    yield "training step on a GPU, four layers of OLMoE's shape in bfloat16: MFU; tokens/s against transformers; telemetry", _whole_step(record)


def _whole_step(record: Mapping[str, Any] | None) -> str:
    targets = (record or {}).get("training", {}).get("targets")
    if targets is None:
        return NOT_MEASURED
    mfu, ratio, percent = (targets[name]["value"] for name in ("mfu", "ratio", "telemetry_percent"))
    figures = [NOT_MEASURED if mfu is None else f"{mfu:.1%}", NOT_MEASURED if ratio is None else f"{ratio:.2f} ×", f"{percent:.2f} % of the step"]
    return "; ".join(figures)


def _against_peers(layers: Mapping[str, Mapping[str, Any]], way: str) -> str:
    speeds = {
        name.removesuffix(f" {way}"): entry["tflops_per_s"] for name, entry in layers.items() if name.endswith(f" {way}") and "tflops_per_s" in entry
    }
    ours = max((speed for name, speed in speeds.items() if name.startswith("triton")), default=None)
    peers = [speed for name, speed in speeds.items() if not name.startswith(("triton", "dense"))]
    if ours is None:
        return NOT_MEASURED
    return f"{ours:.0f} TFLOP/s" + (f", {ours / max(peers):.2f} × the fastest other" if peers else "")


def table(results: Path = RESULTS) -> str:
    """The section between BEGIN and END."""
    cpu, gpu = newest("cpu", results), newest("gpu", results)
    if cpu is None:
        raise FileNotFoundError(f"{results} has no cpu-DATE.json: run `make bench` first")
    machine = f"{cpu['machine']['cores']} cores ({cpu['machine']['processor']}), {cpu['at'][:10]}, torch {cpu['versions']['torch']}"
    device = (
        f"{gpu['versions']['device']}, {gpu['date']}, torch {gpu['versions']['torch']}, triton {gpu['versions']['triton']}" if gpu else "none yet"
    )
    rows = [(what, figure(cpu["figures"])) for what, figure in CPU_ROWS] + list(gpu_rows(gpu))
    lines = ["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]
    return "\n".join([f"Without a GPU: {machine}. On a GPU: {device}.", "", *lines])


def written(readme: str, section: str) -> str:
    """`readme` with `section` between its marks. Raises ValueError where they are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the table: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Writes README.md; {"rows": n, "not_measured": m}."""
    section = table()
    README.write_text(written(README.read_text(), section))
    return {"rows": section.count("\n|") - 2, "not_measured": section.count(NOT_MEASURED)}
