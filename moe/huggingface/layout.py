"""How one of our tensors is made of theirs, and taken apart again: the operations that the families' tables are written in.

Our rotary pairs are neighbours; Llama and its kin pair dimension i of a head with i + R/2, so their rows are reordered.
Letters: E experts, F hidden width of an expert, D model width, R rotated dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Op:
    """`join` makes our tensor from theirs, `split` theirs from ours; each undoes the other, and both work on meta tensors.

    With `packed`, theirs are bytes that hold smaller numbers, and `split` gives their shapes alone.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]
    packed: bool = False


@dataclass(frozen=True)
class Option:
    """Names of theirs that, together, are one of our tensors."""

    theirs: tuple[str, ...]
    op: Op


@dataclass(frozen=True)
class Row:
    """One of our tensors and where it may lie on the disk: the first option is what an export writes.

    Without `ours` it is a tensor that only they have, and that must be zero: `shape` is its shape.
    """

    ours: str | None
    options: tuple[Option, ...]
    shape: tuple[int, ...] = ()


SAME = Op(lambda theirs: theirs[0], lambda ours: [ours])
TRANSPOSED = Op(lambda theirs: theirs[0].mT, lambda ours: [ours.mT])


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix (or of a vector): heads of `head` rows, the last `rotated` of which are rotary pairs of halves. 0: plain rows."""

    count: int
    head: int = 0
    rotated: int = 0

    def to_ours(self, rows: Tensor) -> Tensor:
        """Halves to neighbours."""
        return self._ordered(rows, torch.arange(self.rotated).view(2, -1).t().flatten())

    def to_theirs(self, rows: Tensor) -> Tensor:
        """Neighbours to halves."""
        return self._ordered(rows, torch.arange(self.rotated).view(-1, 2).t().flatten())

    def _ordered(self, rows: Tensor, order_R: Tensor) -> Tensor:
        if not self.rotated:
            return rows
        plain = self.head - self.rotated
        index = torch.cat((torch.arange(plain), plain + order_R)).to(rows.device)
        ordered: Tensor = rows.unflatten(0, (-1, self.head)).index_select(1, index).flatten(0, 1)
        return ordered


def stacked_rows(*parts: Rows) -> Op:
    """Tensors above each other: queries, keys and values; or one tensor whose rows are reordered."""

    def join(theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.to_ours(tensor) for part, tensor in zip(parts, theirs, strict=True)])

    def split(ours: Tensor) -> Sequence[Tensor]:
        return [part.to_theirs(rows) for part, rows in zip(parts, ours.split([part.count for part in parts]), strict=True)]

    return Op(join, split)


def one_matrix(*parts: Rows) -> Op:
    """The same parts in one tensor of theirs (DBRX's Wqkv, JetMoE's kv_proj)."""
    inner = stacked_rows(*parts)
    counts = [part.count for part in parts]
    return Op(lambda theirs: inner.join(theirs[0].split(counts)), lambda ours: [torch.cat(list(inner.split(ours)))])


def each_expert(rows: Rows) -> Op:
    """[E, rows, ...] with the rows of each expert reordered."""

    def through(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda stacked: order(stacked.transpose(0, 1).contiguous()).transpose(0, 1)

    return Op(lambda theirs: through(rows.to_ours)(theirs[0]), lambda ours: [through(rows.to_theirs)(ours)])


def stacked(pieces: int) -> Op:
    """E experts of `pieces` matrices each (gate and up: 2; down: 1), expert by expert: [E, pieces * rows, columns]."""

    def join(theirs: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.cat(list(theirs[at : at + pieces])) for at in range(0, len(theirs), pieces)])

    return Op(join, lambda ours: [piece for expert in ours.unbind() for piece in expert.chunk(pieces)])


def interleaved(*, transposed: bool) -> Op:
    """Gate and up rows of an expert alternate (gpt-oss): [E, D, 2F] transposed, [E, 2F] for biases; ours has all gate rows first."""

    def join(theirs: Sequence[Tensor]) -> Tensor:
        stack = theirs[0].mT if transposed else theirs[0]
        return torch.cat((stack[:, ::2], stack[:, 1::2]), dim=1)

    def split(ours: Tensor) -> Sequence[Tensor]:
        stack = torch.stack(ours.chunk(2, dim=1), dim=2).flatten(1, 2)
        return [stack.mT if transposed else stack]

    return Op(join, split)


def mxfp4(*, alternating: bool) -> Op:
    """Experts in MXFP4, as gpt-oss is published: blocks [E, rows, columns / 32, 16] and scales [E, rows, columns / 32], both bytes.

    With `alternating`, gate and up rows alternate; ours has all gate rows first.
    """

    def join(theirs: Sequence[Tensor]) -> Tensor:
        stack = unpacked_mxfp4(*theirs)
        return torch.cat((stack[:, ::2], stack[:, 1::2]), dim=1) if alternating else stack

    def split(ours: Tensor) -> Sequence[Tensor]:
        groups = ours.new_empty(*ours.shape[:-1], ours.shape[-1] // 32, dtype=torch.uint8, device="meta")
        return [groups.unsqueeze(-1).expand(*groups.shape, 16), groups]

    return Op(join, split, packed=True)


def unpacked_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., G * 32] from bytes [..., G, 16] of two numbers each, the low half first, and an exponent [..., G] for every 32.

    A number is a sign, two bits of exponent and one of fraction (OCP Microscaling Formats 1.0, sections 5.3.3 and 6.3).
    """
    magnitude = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = torch.cat((magnitude, -magnitude))[halves.int()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).flatten(-2)


def flat_gate_up(n_experts: int) -> Op:
    """DBRX: w1 (gate) and v1 (up), each [E * F, D]; ours is [E, 2F, D]."""

    def join(theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.unflatten(0, (n_experts, -1)) for tensor in theirs], dim=1)

    return Op(join, lambda ours: [half.flatten(0, 1) for half in ours.chunk(2, dim=1)])


def flat_down(n_experts: int) -> Op:
    """DBRX: w2 [E * F, D], which is applied transposed; ours is [E, D, F]."""
    return Op(lambda theirs: theirs[0].unflatten(0, (n_experts, -1)).mT, lambda ours: [ours.mT.flatten(0, 1)])
