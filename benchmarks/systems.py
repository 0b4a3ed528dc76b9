"""Every small preset trained on the same tokens: `python -m benchmarks systems [--steps N] [--only NAME…]`.

Each runs in a process of its own by the real trainer, on the built-in corpus; what it says in its spool is kept in the record (JSON) and printed in
the page (docs/systems.md), both written after every run. A system that is in the record with the same spec is not trained again; one that failed is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from spec import events, presets, spool
from spec.experiment import ExperimentSpec

HERE = Path(__file__).parent
RECORD = HERE / "results" / "systems.json"
PAGE = HERE.parent / "docs" / "systems.md"
NANO = [name for name in presets.names() if presets.describe(name).size == "nano"]
BATCH, LENGTH = 8, 256
LIMIT_S = 4 * 3600
Record = dict[str, Any]


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """{steps, tokens, trained, kept, failed}: how many systems were trained now, were in the record already, and failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks systems", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help=f"steps of {BATCH} x {LENGTH} tokens for each (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=NANO, metavar="NAME", help="these presets alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    record: Record = json.loads(args.record.read_text()) if args.record.exists() else {}
    counts = {"trained": 0, "kept": 0, "failed": 0}
    for name in args.only or NANO:
        spec = same_budget(name, args.steps, args.threads)
        if is_done(record.get(name), spec):
            counts["kept"] += 1
            continue
        record[name] = trained(spec)
        counts["failed" if "failure" in record[name] else "trained"] += 1
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        args.page.write_text(page(record))
        print(f"{name:22s} {record[name].get('failure') or record[name]['validation_loss']}", file=sys.stderr, flush=True)
    return {"steps": args.steps, "tokens": args.steps * BATCH * LENGTH, **counts}


# ----- one run


def same_budget(name: str, steps: int, threads: int) -> ExperimentSpec:
    """Preset `name` with `steps` steps of BATCH x LENGTH tokens, on the CPU, validated at its end alone."""
    plain = presets.load(name).model_dump(mode="json")
    plain["data"]["seq_len"] = LENGTH
    plain["training"].update(steps=steps, batch_size=BATCH, grad_accumulation=1, eval_every=0, checkpoint_every=0, keep_checkpoints=1)
    plain["parallel"].update(device="cpu", threads=threads)
    return ExperimentSpec.model_validate(plain)


def digest(spec: ExperimentSpec) -> str:
    """What a system was trained as: equal for equal specs."""
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]


def is_done(entry: Record | None, spec: ExperimentSpec) -> bool:
    """Whether the record holds the figures of this very spec."""
    return entry is not None and "failure" not in entry and entry["spec"] == digest(spec)


def trained(spec: ExperimentSpec) -> Record:
    """The figures of a run of `spec`, or the reason of its failure."""
    entry: Record = {
        "spec": digest(spec),
        "steps": spec.training.steps,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": version("torch")},
    }
    with tempfile.TemporaryDirectory(prefix="moelab-system-") as directory:
        out = Path(directory)
        (out / "spec.json").write_text(spec.model_dump_json())
        started = time.monotonic()
        code, told = _run(out)
        entry["seconds"] = round(time.monotonic() - started, 1)
        attempt = out / "attempts" / "0"
        if code:
            result = json.loads((attempt / "result.json").read_text()) if (attempt / "result.json").exists() else {}
            return {**entry, "failure": result.get("reason") or f"exit code {code}", "detail": str(result.get("detail") or told)[-500:]}
        return {**entry, **figures(attempt / "events.spool")}


def _run(out: Path) -> tuple[int, str]:
    """Exit code and last words of the trainer."""
    command = [sys.executable, "-m", "moe.train", str(out / "spec.json"), "--out", str(out)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S, cwd=HERE.parent, check=False)
    except subprocess.TimeoutExpired:
        return -1, f"not finished after {LIMIT_S} s"
    return done.returncode, done.stdout


def figures(path: Path) -> Record:
    """From a finished run's spool: sizes, losses and speed; of the router the last tenth of the steps."""
    with spool.Reader(path) as reader:
        told = [events.decode(payload) for _, payload in reader.read(max_records=1_000_000, max_bytes=2**34)]
    steps = [event for event in told if isinstance(event, events.StepDone)]
    names = next(event.names for event in told if isinstance(event, events.MetricsDeclared))
    start = next(event for event in told if isinstance(event, events.RunStarted))
    validation = [event for event in told if isinstance(event, events.EvalDone)][-1]
    last = steps[-max(1, len(steps) // 10) :]

    def mean(name: str) -> float | None:
        return round(float(np.mean([event.scalars[names.index(name)] for event in last])), 4) if name in names else None

    return {
        "total_params": start.total_params,
        "active_params": start.active_params,
        "validation_loss": round(validation.loss, 4),
        "bits_per_byte": None if validation.bits_per_byte is None else round(validation.bits_per_byte, 4),
        "max_vio_global": None if validation.max_vio_global is None else round(validation.max_vio_global, 4),
        "max_vio": mean("max_vio"),
        "dead_experts": mean("dead_experts"),
        "dropped_share": mean("dropped_share"),
        "experts": len(start.moe_layers) * start.n_experts,
        "tokens_per_s": round(statistics.median(float(event.scalars[names.index("tokens_per_s")]) for event in steps)),
    }


# ----- the page

HEAD = """\
# The systems

Written by `python -m benchmarks systems`: every small preset on the same tokens of the built-in corpus, from the same seed, by the real trainer.
Validation loss in nats per byte, on text that is held out. MaxVio: (largest load - mean) / mean, mean over MoE layers, over the whole validation
text and over the last tenth of the training batches. Dead: experts of all layers without a token in a training batch, mean over the last tenth.
At this size and length differences of a few hundredths are noise; expert choice sees the future, so that its loss is not comparable.

| System | Validation loss | MaxVio, validation | MaxVio, batch | Dead experts | Dropped | Tokens/s | Parameters | Active | Steps |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def page(record: Record) -> str:
    """The record as Markdown, the lowest loss first, failures last."""
    done = sorted((name for name in record if "failure" not in record[name]), key=lambda name: float(record[name]["validation_loss"]))
    failed = sorted(name for name in record if "failure" in record[name])
    rows = [_row(name, record[name]) for name in done]
    rows += [f"| {_title(name)} | failed: {record[name]['failure']} |" + " |" * 8 for name in failed]
    machines = sorted({"{cores} cores, {processor}, torch {torch}".format(**entry["machine"]) for entry in record.values()})
    return HEAD + "\n".join(rows) + "\n\nMeasured on: " + "; ".join(machines) + ".\n"


def _row(name: str, entry: Record) -> str:
    cells = (
        _title(name),
        f"{entry['validation_loss']:.3f}",
        _figure(entry["max_vio_global"], ".2f"),
        _figure(entry["max_vio"], ".2f"),
        f"{entry['dead_experts']:.1f} of {entry['experts']}" if entry["dead_experts"] is not None else "–",
        _figure(entry["dropped_share"], ".1%"),
        f"{entry['tokens_per_s']:,}",
        f"{entry['total_params'] / 1e6:.2f}M",
        f"{entry['active_params'] / 1e6:.2f}M",
        str(entry["steps"]),
    )
    return "| " + " | ".join(cells) + " |"


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _title(name: str) -> str:
    return presets.describe(name).title if name in NANO else name
