"""The processes of a run, one per device: each has its own part of the batch and the whole model, but for experts that are shared out.

Ranks of one host meet through a file store (MOELAB_RENDEZVOUS) and talk over loopback, so that no port listens to the network.
Those of several meet at an address (`tcp://…`); without MOELAB_RENDEZVOUS they meet as torchrun arranges it (MASTER_ADDR and MASTER_PORT).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from moe.parallel import Mesh
from moe.train.stop import SpecRefused
from spec.training import Parallel


@dataclass(frozen=True)
class Ranks:
    """This process's place among the run's. R = `size`. `mesh` says who holds which experts, where parallel.expert shares them out.

    With `shard` the ranks hold a part of every other weight each.
    """

    rank: int
    size: int
    device: torch.device
    mesh: Mesh | None = None
    shard: bool = False

    @property
    def together(self) -> bool:
        """Whether all ranks must make the same forward passes: each holds what the others need."""
        return self.mesh is not None or self.shard

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def gather(self, vector: Tensor) -> Tensor:
        """[R, n]: every rank's `vector` [n], on every rank."""
        if self.size == 1:
            return vector[None]
        gathered = vector.new_empty(self.size, *vector.shape)
        dist.all_gather_single(gathered.view(-1), vector.contiguous().view(-1))
        return gathered

    def from_first(self, value: int) -> int:
        """Rank 0's `value`, on every rank."""
        return int(self.gather(torch.tensor([value], device=self.device))[0, 0])

    def any(self, wish: bool) -> bool:
        """Whether this rank's `wish` is a wish of any rank that must make the same forward passes: of this one alone, where none must."""
        return wish if not self.together else bool(self.gather(torch.tensor([wish], device=self.device)).any())

    @property
    def alone(self) -> Ranks:
        """This rank, for what it does without the others."""
        return Ranks(self.rank, 1, self.device)

    @property
    def is_spread(self) -> bool:
        """Whether some of the ranks are on other hosts."""
        return self.size > int(os.environ.get("LOCAL_WORLD_SIZE") or self.size)

    def leave(self) -> None:
        """Waits for the other ranks, and parts."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def join(parallel: Parallel) -> Ranks:
    """Takes this process's place among the run's. Raises SpecRefused where the processes are not those of the spec."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size != parallel.world_size:
        raise SpecRefused("parallel.data", f"parallel.expert x parallel.data = {parallel.world_size} processes, but {size} were started (WORLD_SIZE)")
    device = _device(parallel)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=float(os.environ.get("MOELAB_COLLECTIVE_TIMEOUT_S", "300")))
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(rank, size, timeout), rank=rank, world_size=size, timeout=timeout)
    mesh = Mesh.of(parallel.data, parallel.expert, overlap=parallel.overlap, timeout=timeout) if parallel.expert > 1 else None
    return Ranks(rank, size, device, mesh, shard=parallel.shard and size > 1)


def _store(rank: int, size: int, timeout: timedelta) -> Store | None:
    """Where the ranks find each other; None leaves it to the environment, as torchrun sets it."""
    where = os.environ.get("MOELAB_RENDEZVOUS")
    if not where:
        return None
    if not where.startswith("tcp://"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return FileStore(where, size)
    place, listener = urlsplit(where), os.environ.get("MOELAB_RENDEZVOUS_FD")
    return TCPStore(
        place.hostname or "",
        place.port or 0,
        size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(listener) if rank == 0 and listener else None,  # open already, so that nobody else can have taken the port
    )


def _device(parallel: Parallel) -> torch.device:
    wanted = os.environ.get("MOELAB_DEVICE") or parallel.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SpecRefused("parallel.device", f"{wanted}: this machine has no CUDA device that torch can use")
        return device if device.index is not None else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def set_threads(parallel: Parallel) -> None:
    """CPU threads of this process: the spec's, else the worker's (MOELAB_THREADS), else torch's own choice."""
    threads = parallel.threads or int(os.environ.get("MOELAB_THREADS") or 0)
    if threads:
        torch.set_num_threads(threads)
