"""Expert parallelism: the experts of a layer spread over ranks, tokens sent to them and back (GShard, section 3.2).

A transfer only begins where rows are handed over, and is waited for where they are used: what runs between, runs meanwhile. The order in
which autograd walks back does the same with the gradients.

Rank r of `data` x `expert` ranks holds shard r % expert of the experts, for replica r // expert. Every rank has its own part of the
batch and a whole copy of everything but the experts. Sums over tokens are the sums of one process, in another order.

Letters: T tokens of this rank, D width, K experts chosen per token, E experts, P ranks that share them, N rows sent, M rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.balance import counts
from moe.laps import Laps

Ffn = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mesh:
    """This process's place among `data` x `expert` ranks.

    `shards` are the ranks that share one set of experts, `replicas` those that hold the same experts. With `overlap` shared experts run
    while rows travel.
    """

    data: int
    expert: int
    rank: int
    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup
    overlap: bool = True

    @classmethod
    def of(cls, data: int, expert: int, *, overlap: bool = True, timeout: timedelta | None = None) -> Mesh:
        """Collective: every rank of the default group, whose size is data * expert, calls it at the same point. `timeout`: of collectives."""
        rank = dist.get_rank()
        if dist.get_world_size() != data * expert:
            raise ValueError(f"{dist.get_world_size()} ranks are not data {data} x expert {expert}")
        rows = [list(range(replica * expert, (replica + 1) * expert)) for replica in range(data)]
        shards, _ = dist.new_subgroups_by_enumeration(rows, timeout=timeout)
        replicas, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*rows, strict=True)], timeout=timeout)
        return cls(data, expert, rank, shards, replicas, overlap)

    @property
    def shard(self) -> int:
        """Which of the `expert` parts of the experts this rank holds."""
        return self.rank % self.expert

    def held(self, n_experts: int) -> slice:
        """The experts that this rank holds: equal, consecutive parts."""
        size = n_experts // self.expert
        return slice(self.shard * size, (self.shard + 1) * size)


@dataclass(frozen=True)
class Slots:
    """Where a layer's experts lie, if not in equal parts: `slot_EC` int64[E + 1, C] the slots of each expert, the first `copies_E` of a row.

    There are `total` slots, in equal parts over the ranks. Row E, which a dropped assignment has, holds `total`.
    """

    slot_EC: Tensor
    copies_E: Tensor
    total: int

    @classmethod
    def of(cls, expert_S: Sequence[int], n_experts: int, ranks: int) -> Slots:
        """From the expert in each slot. Raises ValueError where an expert has no slot, or the ranks would not hold equally many."""
        slots: list[list[int]] = [[] for _ in range(n_experts)]
        for slot, expert in enumerate(expert_S):
            if not 0 <= expert < n_experts:
                raise ValueError(f"slot {slot} holds expert {expert}, of {n_experts}")
            slots[expert].append(slot)
        total = len(expert_S)
        if missing := [expert for expert, own in enumerate(slots) if not own]:
            raise ValueError(f"expert {missing[0]} has no slot")
        if total % ranks:
            raise ValueError(f"{total} slots are not equally many on each of {ranks} ranks")
        most = max(map(len, slots))
        rows = [own + own[:1] * (most - len(own)) for own in [*slots, [total]]]
        return cls(torch.tensor(rows), torch.tensor([*map(len, slots), 1]), total)

    def spread(self, expert_TK: Tensor) -> Tensor:
        """int64[T, K]: the slot that serves each assignment. Tokens take turns over an expert's copies by their position."""
        position_T1 = torch.arange(len(expert_TK), device=expert_TK.device)[:, None]
        copies_E, slot_EC = self.copies_E.to(expert_TK.device), self.slot_EC.to(expert_TK.device)
        return slot_EC[expert_TK, position_T1 % copies_E[expert_TK]]


class Routed(NamedTuple):
    """What routed experts made: their sum [T, D]; rows sent to each rank that shares them, int64[P]; and what ran beside them, if anything."""

    y_TD: Tensor
    sent_P: Tensor | None
    beside: Tensor | None


class _Trip:
    """Rows on their way to other ranks, and their gradients on the way home: `sent` and `received` rows to and from each rank.

    `left` and `reached` are the parts of a step that rows come from and go to.
    """

    def __init__(self, sent: list[int], received: list[int], mesh: Mesh, laps: Laps | None, left: str, reached: str) -> None:
        self.sent, self.received, self.left, self.reached = sent, received, left, reached
        self._mesh, self._laps = mesh, laps
        self._work: dist.Work | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def begin(self, rows: Tensor, *, home: bool = False, meet: bool = True) -> Tensor:
        """Sets the rows (or the gradients, `home`) off; what is returned has them when `end` has been called."""
        sent, received = (self.received, self.sent) if home else (self.sent, self.received)
        rows, arriving = rows.contiguous(), rows.new_empty(sum(received), *rows.shape[1:])
        if self._laps is not None:
            self._laps.meet(self._mesh.shards) if meet else self._laps.mark("communication")
            self._laps.sent_bytes += (sum(sent) - sent[self._mesh.shard]) * rows[:1].numel() * rows.element_size()
        self._work = dist.all_to_all_single(arriving, rows, received, sent, group=self._mesh.shards, async_op=True)
        self._kept = rows, arriving
        return arriving

    def end(self, *, home: bool = False) -> Tensor:
        """Waits until the rows are here, and returns them."""
        assert self._work is not None
        assert self._kept is not None
        if self._laps is not None:
            self._laps.mark("communication")
        self._work.wait()
        (_, arrived), self._kept, self._work = self._kept, None, None
        if self._laps is not None:
            self._laps.mark(self.left if home else self.reached)
        return arrived


class _Depart(torch.autograd.Function):
    """Rows set off; backward their gradients are waited for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip, meet: bool) -> Tensor:
        ctx.trip = trip
        return trip.begin(rows, meet=meet)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.trip.end(home=True), None, None


class _Arrive(torch.autograd.Function):
    """Rows are waited for; backward their gradients set off."""

    @staticmethod
    def forward(ctx: Any, arriving: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return trip.end().view_as(arriving)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.trip.begin(gradient, home=True)
        return gradient, None  # of the shape that autograd wants; _Depart takes what comes home


def _depart(rows: Tensor, trip: _Trip, *, meet: bool) -> Tensor:
    arriving: Tensor = _Depart.apply(rows, trip, meet)  # type: ignore[no-untyped-call]
    return arriving


def _arrive(arriving: Tensor, trip: _Trip) -> Tensor:
    arrived: Tensor = _Arrive.apply(arriving, trip)  # type: ignore[no-untyped-call]
    return arrived


def expert_ffn(
    x_TD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    n_experts: int,
    mesh: Mesh,
    ffn: Ffn,
    beside: Callable[[], Tensor] | None = None,
    laps: Laps | None = None,
) -> Routed:
    """sum_k gate_tk * FFN_expert_tk(x_t) with the experts of all ranks of `mesh.shards`; `beside` runs too, meanwhile where it overlaps.

    `ffn(x_MD, expert_M1, gate_M1)` runs the experts that this rank holds, numbered from 0. Expert E is a dropped assignment, which is not sent.
    Collective: all ranks of the group call it, forward and backward, in the same order of layers.
    """
    top_k, held = expert_TK.shape[1], n_experts // mesh.expert
    expert_R, slot_R = expert_TK.flatten().sort(stable=True)
    count_E = counts(expert_R, n_experts)
    arriving_E = torch.empty_like(count_E)
    if laps is not None:
        laps.meet(mesh.shards)
    dist.all_to_all_single(arriving_E, count_E, group=mesh.shards)
    both_2P = torch.stack((count_E, arriving_E)).view(2, mesh.expert, held).sum(2)
    sent, received = both_2P.tolist()
    if laps is not None:
        laps.mark("dispatch")
    slot_N = slot_R[: sum(sent)]
    out = _Trip(sent, received, mesh, laps, "dispatch", "experts")
    arriving_MD = _depart(x_TD[slot_N // top_k], out, meet=False)
    ran = beside() if beside is not None and mesh.overlap else None
    rows_MD = _arrive(arriving_MD, out)
    own_M = torch.arange(held, device=x_TD.device).repeat(mesh.expert).repeat_interleave(arriving_E, output_size=sum(received))
    made_MD = ffn(rows_MD, own_M[:, None], torch.ones(len(own_M), 1, dtype=gate_TK.dtype, device=x_TD.device))
    back = _Trip(received, sent, mesh, laps, "experts", "combine")
    back_ND = _arrive(_depart(made_MD, back, meet=True), back)
    # Summed over k in a fixed order: a scatter would add on a GPU in any.
    row_R = torch.full_like(slot_R, len(slot_N)).scatter_(0, slot_N, torch.arange(len(slot_N), device=x_TD.device))
    y_TKD = torch.cat((back_ND, back_ND.new_zeros(1, x_TD.shape[1])))[row_R].unflatten(0, expert_TK.shape)
    y_TD = (y_TKD * gate_TK.to(back_ND.dtype)[:, :, None]).sum(1)
    return Routed(y_TD, both_2P[0], beside() if beside is not None and not mesh.overlap else ran)
