"""Runs a function on several ranks, each a process of its own, over gloo on loopback."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _start(rank: int, size: int, store: str, work: Callable[..., Any], args: tuple[Any, ...], out: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.save(work(*args), f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, directory: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` on each of `size` ranks; what each returned. `work` is a function of a module."""
    directory.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_start, (size, str(directory / "store"), work, args, str(directory)), nprocs=size, start_method="spawn")
    return [torch.load(directory / f"{rank}.pt") for rank in range(size)]
