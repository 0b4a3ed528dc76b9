"""Whether running shared experts while rows travel makes a step shorter: `python -m benchmarks overlap`.

Two ranks of this machine share the experts over gloo, one thread each. The same model takes steps (forward and backward) with and without
overlap, and with a sampled step's clock, in turn, so that other load on the machine meets all alike; figures are medians of the slower
rank's time. `overlap_ratio` is the time without over the time with; `sampled_ratio` the time of a sampled step over that of another.
Where the ranks share the cores with each other and with gloo's threads, a transfer leaves no core idle: there is little to win.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from moe.laps import Laps
from moe.model import Transformer, build_model
from moe.parallel import Mesh
from spec.model import Model

RANKS, BATCH, LENGTH, VOCABULARY = 2, 4, 256, 512
VARIANTS = ("overlapped", "one after the other", "sampled")


def model_spec() -> Model:
    """Shared experts that take about as long as the transfer of the routed rows."""
    moe = {"n_experts": 16, "top_k": 4, "d_expert": 128, "n_shared": 4, "balance": [{"kind": "switch_aux"}]}
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 4}
    return Model.model_validate({"n_layers": 4, "d_model": 256, "vocab_size": VOCABULARY, "attention": attention, "moe": moe})


def step(model: Transformer, laps: Laps | None) -> float:
    """Seconds of one step."""
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    dist.barrier()
    started = time.perf_counter()
    output = model(tokens[:, :-1], tokens[:, 1:], laps=laps)
    if laps is not None:
        laps.in_backward = True
    (output.lm_loss + output.balance_loss).backward()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


def work(rank: int, store: str, turns: int) -> None:
    """One rank: takes the turns, and writes its seconds."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = Mesh.of(1, RANKS)
    models = {}
    for name in VARIANTS:
        torch.manual_seed(0)
        models[name] = build_model(model_spec(), mesh=replace(mesh, overlap=name != "one after the other"))
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(turns + 2):
        for name, model in models.items():
            took = step(model, Laps(torch.device("cpu")) if name == "sampled" else None)
            if turn >= 2:
                seconds[name].append(took)
    torch.save(seconds, f"{store}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The medians in milliseconds, and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks overlap")
    parser.add_argument("--turns", type=int, default=30, help="steps of each variant (default 30)")
    turns = parser.parse_args(arguments).turns
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        start_processes(work, (store, turns), nprocs=RANKS, start_method="spawn")
        ranks = [torch.load(f"{store}.{rank}") for rank in range(RANKS)]
    slower = {name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)] for name in VARIANTS}
    median_ms = {name: 1000 * statistics.median(times) for name, times in slower.items()}
    return {
        "ranks": RANKS,
        "cores": os.cpu_count(),
        "turns": turns,
        "step_ms": median_ms,
        "overlap_ratio": median_ms["one after the other"] / median_ms["overlapped"],
        "sampled_ratio": median_ms["sampled"] / median_ms["overlapped"],
    }
