"""What lies on rank 0's host only, handed to the ranks of other hosts. Every rank calls these."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.train import checkpoint
from moe.train.corpus import Domain
from moe.train.ranks import Ranks
from moe.train.stop import DiskFull, SpecRefused

_CORPUS_SAMPLE = 1_000_000  # Tokens of each stream that tell one corpus from another.
RESERVE = 3  # A run does not start where its disk would not hold so many of its checkpoints, those that it has already among them.


def check_room(ranks: Ranks, directory: Path, checkpoint_bytes: int, keep: int) -> None:
    """Raises DiskFull, on every rank, where RESERVE checkpoints of that size would not fit on the disk of rank 0, which writes them.

    Fewer do where fewer are kept: `keep`, and the one that is being written. Those that are there make room by going.
    """
    there = min(keep, len(checkpoint.steps(directory / "checkpoints")))
    wanted = ranks.from_first(max(1, min(RESERVE, keep + 1) - there))
    free = ranks.from_first(shutil.disk_usage(directory).free)
    if free < wanted * checkpoint_bytes:
        raise DiskFull(f"{directory} has {free / 1e9:.2f} GB free; a checkpoint takes {checkpoint_bytes / 1e9:.2f} GB, and {wanted} must fit")


def load_checkpoint(ranks: Ranks, directory: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by file, state) of rank 0's checkpoint of `step`, on the CPU: read where every rank's disk holds the very same one, else sent."""
    path = directory / f"step-{step:08d}" / checkpoint.MANIFEST
    if same(ranks, path.read_bytes() if path.is_file() else b""):
        return checkpoint.load(directory, step)
    tensors, state = checkpoint.load(directory, step) if ranks.is_first else ({}, {})
    places = [[file, name] for file, group in tensors.items() for name in group]
    plan = [[*place, str(tensors[place[0]][place[1]].dtype).removeprefix("torch."), list(tensors[place[0]][place[1]].shape)] for place in places]
    told = json.loads(_send(ranks, json.dumps({"plan": plan, "state": state}).encode()))
    received: dict[str, dict[str, Tensor]] = {}
    for file, name, dtype, shape in told["plan"]:
        tensor = tensors[file][name] if ranks.is_first else torch.empty(shape, dtype=getattr(torch, dtype))
        received.setdefault(file, {})[name] = from_first(ranks, tensor)
    return received, told["state"]


def from_first(ranks: Ranks, tensor: Tensor) -> Tensor:
    """Rank 0's `tensor`, where the others bring one of its shape, dtype and device, which is filled in place."""
    if ranks.size > 1 and tensor.numel():
        moved = tensor.detach().contiguous().to(ranks.device)
        dist.broadcast(moved.view(-1).view(torch.uint8), src=0)
        if not ranks.is_first:
            tensor.copy_(moved)
    return tensor


def same(ranks: Ranks, data: bytes) -> bool:
    """Whether all ranks brought the same bytes."""
    digest = int.from_bytes(hashlib.sha256(data).digest()[:7])
    gathered = ranks.gather(torch.tensor([digest], device=ranks.device))
    return bool((gathered == gathered[0]).all())


def check_corpus(ranks: Ranks, domains: Sequence[Domain]) -> None:
    """Raises SpecRefused, on every rank, where the hosts have built different corpora, so that their tokens would not be of one run."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(json.dumps([domain.name, domain.vocabulary.identity, len(domain.training), len(domain.validation)]).encode())
        for stream in (domain.training, domain.validation):
            digest.update(stream[:_CORPUS_SAMPLE].tobytes())
    if not same(ranks, digest.digest()):
        raise SpecRefused("data", "the hosts of this run do not have the same texts: its ranks would train on different corpora")


def _send(ranks: Ranks, data: bytes) -> bytes:
    """Rank 0's `data`, on every rank."""
    size = ranks.from_first(len(data))
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8) if ranks.is_first else torch.empty(size, dtype=torch.uint8)
    return bytes(from_first(ranks, buffer).numpy())
