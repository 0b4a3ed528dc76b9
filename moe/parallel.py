"""Expert parallelism: the experts of a layer spread over ranks, tokens sent to them and back (GShard, section 3.2).

Rank r of `data` x `expert` ranks holds shard r % expert of the experts, for replica r // expert. Every rank has its own part of the
batch and a whole copy of everything but the experts. Sums over tokens are the sums of one process, in another order.

Letters: T tokens of this rank, D width, K experts chosen per token, E experts, P ranks that share them, N rows sent, M rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.balance import counts

Ffn = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mesh:
    """This process's place among `data` x `expert` ranks.

    `shards` are the ranks that share one set of experts, `replicas` those that hold the same experts.
    """

    data: int
    expert: int
    rank: int
    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup

    @classmethod
    def of(cls, data: int, expert: int) -> Mesh:
        """Collective: every rank of the default group, whose size is data * expert, calls it at the same point."""
        rank = dist.get_rank()
        if dist.get_world_size() != data * expert:
            raise ValueError(f"{dist.get_world_size()} ranks are not data {data} x expert {expert}")
        rows = [list(range(replica * expert, (replica + 1) * expert)) for replica in range(data)]
        shards, _ = dist.new_subgroups_by_enumeration(rows)
        replicas, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*rows, strict=True)])
        return cls(data, expert, rank, shards, replicas)

    @property
    def shard(self) -> int:
        """Which of the `expert` parts of the experts this rank holds."""
        return self.rank % self.expert

    def held(self, n_experts: int) -> slice:
        """The experts that this rank holds: equal, consecutive parts."""
        size = n_experts // self.expert
        return slice(self.shard * size, (self.shard + 1) * size)


class _Exchange(torch.autograd.Function):
    """Rows to the ranks that they are for; backward the gradients home."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _send(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _send(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    exchanged: Tensor = _Exchange.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged


def _send(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group)
    return arrived


def expert_ffn(x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, n_experts: int, mesh: Mesh, ffn: Ffn) -> tuple[Tensor, Tensor]:
    """sum_k gate_tk * FFN_expert_tk(x_t) with the experts of all ranks of `mesh.shards`, and the rows sent to each of them, int64[P].

    `ffn(x_MD, expert_M1, gate_M1)` runs the experts that this rank holds, numbered from 0. Expert E is a dropped assignment, which is not sent.
    Collective: all ranks of the group call it, forward and backward, in the same order of layers.
    """
    top_k, held = expert_TK.shape[1], n_experts // mesh.expert
    expert_R, slot_R = expert_TK.flatten().sort(stable=True)
    count_E = counts(expert_R, n_experts)
    arriving_E = torch.empty_like(count_E)
    dist.all_to_all_single(arriving_E, count_E, group=mesh.shards)
    both_2P = torch.stack((count_E, arriving_E)).view(2, mesh.expert, held).sum(2)
    sent, received = both_2P.tolist()
    slot_N = slot_R[: sum(sent)]
    rows_MD = _exchange(x_TD[slot_N // top_k], sent, received, mesh.shards)
    own_M = torch.arange(held, device=x_TD.device).repeat(mesh.expert).repeat_interleave(arriving_E)
    made_MD = ffn(rows_MD, own_M[:, None], torch.ones(len(own_M), 1, dtype=gate_TK.dtype, device=x_TD.device))
    back_ND = _exchange(made_MD, received, sent, mesh.shards)
    # Summed over k in a fixed order: a scatter would add on a GPU in any.
    row_R = torch.full_like(slot_R, len(slot_N)).scatter_(0, slot_N, torch.arange(len(slot_N), device=x_TD.device))
    y_TKD = torch.cat((back_ND, back_ND.new_zeros(1, x_TD.shape[1])))[row_R].unflatten(0, expert_TK.shape)
    return (y_TKD * gate_TK.to(back_ND.dtype)[:, :, None]).sum(1), both_2P[0]
