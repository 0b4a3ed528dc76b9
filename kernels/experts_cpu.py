"""The routed feed-forward for CPUs: assignments sorted by expert, matrix products per expert, the rest a few experts at a time.

What makes it fast (measured, see docs/log.md): rows are gathered, activated and multiplied in pieces that stay in cache; only the
up-projection's output is kept for the backward pass; the gate is folded into the activation; gradients are written in place;
`embedding_bag` sums a token's rows; in bfloat16 each expert's rows are padded to a multiple of 32, because oneDNN compiles anew for
every row count that it has not seen, and weights are cast piece by piece.

Letters: T tokens, D width, K experts chosen per token, E experts, F expert width, H = 2F (gated) or F, R rows (sorted
assignments), N rows of one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activation import GATED, LIMIT, STEEPNESS
from kernels.plan import Plan, make_plan

PIECE_BYTES = 1 << 21  # of the up-projection's output that one piece makes
aten = torch.ops.aten


@dataclass(frozen=True)
class Pointwise:
    """An activation function and its derivative, both writing into a given tensor."""

    value: Callable[[Tensor, Tensor], Tensor]  # (h, out)
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]  # (gradient, h, out)
    limit: float | None = None  # the other half is clamped to +-limit and raised by one


_SILU = Pointwise(lambda h, out: aten.silu.out(h, out=out), lambda g, h, out: aten.silu_backward.grad_input(g, h, grad_input=out))
_GELU = Pointwise(lambda h, out: aten.gelu.out(h, out=out), lambda g, h, out: aten.gelu_backward.grad_input(g, h, grad_input=out))
_RELU = Pointwise(lambda h, out: torch.clamp_min(h, 0, out=out), lambda g, h, out: aten.threshold_backward.grad_input(g, h, 0, grad_input=out))


def _clamped_value(h: Tensor, out: Tensor) -> Tensor:
    """z sigmoid(1.702 z) of z = min(h, 7)."""
    torch.clamp_max(h, LIMIT, out=out).mul_(STEEPNESS)
    return F.silu(out, inplace=True).div_(STEEPNESS)


def _clamped_slope(gradient: Tensor, h: Tensor, out: Tensor) -> Tensor:
    return aten.silu_backward.grad_input(gradient, h.clamp_max(LIMIT).mul_(STEEPNESS), grad_input=out).mul_(h <= LIMIT)


_CLAMPED = Pointwise(_clamped_value, _clamped_slope, LIMIT)
POINTWISE = {"swiglu": _SILU, "geglu": _GELU, "gelu": _GELU, "relu": _RELU, "swiglu_clamped": _CLAMPED}


Lap = Callable[[str], None]


def _silent(_: str) -> None:
    """Nobody asks what takes how long."""


def expert_ffn(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    activation: str,
    b_in_EH: Tensor | None = None,
    lap: Lap | None = None,
    casts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `experts_naive.expert_ffn`. Products are in x's dtype whatever the weights' dtype; weight gradients have the weights'.
    `casts` are both weights in x's dtype, where somebody has cast them already.

    Bit-reproducible for a given number of threads. `lap` is told when dispatch, experts and combine begin, in both passes: the gather of
    rows, a piece at a time before its products, is the experts'. Raises KeyError for an unknown activation.
    """
    lap = lap or _silent
    lap("dispatch")
    plan = make_plan(expert_TK, w_in_EHD.shape[0], multiple(x_TD.dtype))
    y_TD: Tensor = _ExpertFfn.apply(x_TD, w_in_EHD, w_out_EDF, gate_TK, b_in_EH, plan, activation, lap, casts)
    return y_TD


def multiple(dtype: torch.dtype) -> int:
    """What each expert's rows are padded to a multiple of."""
    return 32 if dtype == torch.bfloat16 else 1


@dataclass(frozen=True)
class _Piece:
    """Consecutive experts, their rows, and the number of rows of each."""

    experts: slice
    rows: slice
    sizes: list[int]


def _pieces(size_E: list[int], most_rows: int) -> list[_Piece]:
    """Cut the experts into runs of at most `most_rows` rows, or of one expert."""
    pieces: list[_Piece] = []
    first, start, rows = 0, 0, 0
    for expert, size in enumerate(size_E):
        if expert > first and rows + size > most_rows:
            pieces.append(_Piece(slice(first, expert), slice(start, start + rows), size_E[first:expert]))
            first, start, rows = expert, start + rows, 0
        rows += size
    pieces.append(_Piece(slice(first, len(size_E)), slice(start, start + rows), size_E[first:]))
    return pieces


def forward(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    gate_TK: Tensor,
    b_in_EH: Tensor | None,
    plan: Plan,
    activation: str,
    h_RH: Tensor,
    lap: Lap = _silent,
) -> Tensor:
    """The layer's output; the up-projection's goes into `h_RH`. All of one dtype but the gates and the bias."""
    lap("experts")
    pieces = _pieces(plan.size_E, PIECE_BYTES // (h_RH.shape[1] * x_TD.element_size()))
    gate_R1, y_RD = _gates(x_TD, gate_TK, plan), _rows(x_TD, plan)
    for piece in pieces:
        h_NH = h_RH[piece.rows]
        x_ND = x_TD.index_select(0, plan.token_R[piece.rows])
        _multiply(x_ND, w_in_EHD[piece.experts].transpose(1, 2), h_NH, piece.sizes)
        if b_in_EH is not None:
            _add(b_in_EH[piece.experts], h_NH, piece.sizes)
        act_NF = _activate(POINTWISE[activation], activation in GATED, h_NH).mul_(gate_R1[piece.rows])
        _multiply(act_NF, w_out_EDF[piece.experts].transpose(1, 2), y_RD[piece.rows], piece.sizes)
    lap("combine")
    return F.embedding_bag(plan.row_TK, y_RD, mode="sum")


@dataclass(frozen=True)
class Dtypes:
    """Those of the gradients: of both weights, the gates, and the bias where there is one."""

    w_in: torch.dtype
    w_out: torch.dtype
    gate: torch.dtype
    b_in: torch.dtype | None


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    gate_TK: Tensor,
    h_RH: Tensor,
    plan: Plan,
    activation: str,
    dtypes: Dtypes,
    lap: Lap = _silent,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, both weights, the gates and the bias, where `h_RH` is what `forward` filled."""
    lap("experts")
    pieces = _pieces(plan.size_E, PIECE_BYTES // (h_RH.shape[1] * x_TD.element_size()))
    dy_TD, gate_R1 = dy_TD.contiguous(), _gates(x_TD, gate_TK, plan)
    dx_RD, dgate_R = _rows(x_TD, plan), x_TD.new_empty(plan.n_rows)
    dw_in_EHD, dw_out_EDF = torch.empty_like(w_in_EHD, dtype=dtypes.w_in), torch.empty_like(w_out_EDF, dtype=dtypes.w_out)
    db_in_EH = None if dtypes.b_in is None else torch.empty(w_in_EHD.shape[:2], dtype=dtypes.b_in)
    for piece in pieces:
        token_N, gate_N1, h_NH = plan.token_R[piece.rows], gate_R1[piece.rows], h_RH[piece.rows]
        dy_ND = dy_TD.index_select(0, token_N)
        dact_NF = x_TD.new_empty(len(token_N), w_out_EDF.shape[2])
        _multiply(dy_ND, w_out_EDF[piece.experts], dact_NF, piece.sizes)
        act_NF, dh_NH = _activate_backward(POINTWISE[activation], activation in GATED, h_NH, dact_NF, gate_N1, dgate_R[piece.rows])
        _multiply(dh_NH, w_in_EHD[piece.experts], dx_RD[piece.rows], piece.sizes)
        if db_in_EH is not None:
            _sum_rows(dh_NH, db_in_EH[piece.experts], piece.sizes)
        _multiply_rows(dh_NH, x_TD.index_select(0, token_N), dw_in_EHD[piece.experts], piece.sizes)
        _multiply_rows(dy_ND, act_NF, dw_out_EDF[piece.experts], piece.sizes)
    lap("dispatch")
    dgate_TK = torch.zeros(plan.row_TK.shape, dtype=dtypes.gate)
    dgate_TK.view(-1)[plan.slot_N] = dgate_R[plan.kept_N].to(dtypes.gate)
    return F.embedding_bag(plan.row_TK, dx_RD, mode="sum"), dw_in_EHD, dw_out_EDF, dgate_TK, db_in_EH


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        w_in_EHD: Tensor,
        w_out_EDF: Tensor,
        gate_TK: Tensor,
        b_in_EH: Tensor | None,
        plan: Plan,
        activation: str,
        lap: Lap,
        casts: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        ctx.dtypes = Dtypes(w_in_EHD.dtype, w_out_EDF.dtype, gate_TK.dtype, None if b_in_EH is None else b_in_EH.dtype)
        ctx.plan, ctx.activation, ctx.lap = plan, activation, lap
        w_in_EHD, w_out_EDF = casts or (w_in_EHD.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype))
        h_RH = x_TD.new_empty(plan.n_rows, w_in_EHD.shape[1])
        y_TD = forward(x_TD, w_in_EHD, w_out_EDF, gate_TK, b_in_EH, plan, activation, h_RH, lap)
        ctx.save_for_backward(x_TD, w_in_EHD, w_out_EDF, gate_TK, h_RH)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dy_TD, *ctx.saved_tensors, ctx.plan, ctx.activation, ctx.dtypes, ctx.lap), None, None, None, None


def _gates(x_TD: Tensor, gate_TK: Tensor, plan: Plan) -> Tensor:
    """[R, 1]: each row's gate in x's dtype; 0 for padding."""
    gate_R1 = x_TD.new_zeros(plan.n_rows, 1)
    gate_R1[plan.kept_N, 0] = gate_TK.flatten()[plan.slot_N].to(x_TD.dtype)
    return gate_R1


def _rows(x_TD: Tensor, plan: Plan) -> Tensor:
    """Room for every row's output, and a zero row for dropped assignments to read."""
    rows = x_TD.new_empty(plan.n_rows + 1, x_TD.shape[1])
    rows[plan.n_rows] = 0
    return rows


def _multiply(a_NA: Tensor, b_EAB: Tensor, out_NB: Tensor, sizes: list[int]) -> None:
    """Each expert's rows of `a` times its matrix, into its rows of `out`."""
    for size, a, b, out in zip(sizes, a_NA.split(sizes), b_EAB.unbind(), out_NB.split(sizes), strict=True):
        if size:
            torch.mm(a, b, out=out)


def _multiply_rows(a_NA: Tensor, b_NB: Tensor, out_EAB: Tensor, sizes: list[int]) -> None:
    """The product over each expert's rows, a.T @ b, into its matrix of `out`, in out's dtype."""
    same = out_EAB.dtype == a_NA.dtype
    for size, a, b, out in zip(sizes, a_NA.t().split(sizes, dim=1), b_NB.split(sizes), out_EAB.unbind(), strict=True):
        if not size:
            out.zero_()
        elif same:
            torch.mm(a, b, out=out)
        else:
            out.copy_(torch.mm(a, b))


def _add(b_EH: Tensor, out_NH: Tensor, sizes: list[int]) -> None:
    """Each expert's bias to its rows of `out`."""
    for b_H, out in zip(b_EH.to(out_NH.dtype), out_NH.split(sizes), strict=True):
        out.add_(b_H)


def _sum_rows(a_NA: Tensor, out_EA: Tensor, sizes: list[int]) -> None:
    """The sum of each expert's rows, into its row of `out`."""
    for a, out_A in zip(a_NA.split(sizes), out_EA, strict=True):
        out_A.copy_(a.sum(0))


def _lifted(point: Pointwise, up_NF: Tensor) -> Tensor:
    return up_NF if point.limit is None else up_NF.clamp(-point.limit, point.limit).add_(1)


def _activate(point: Pointwise, gated: bool, h_NH: Tensor) -> Tensor:
    if not gated:
        return point.value(h_NH, torch.empty_like(h_NH))
    gate_NF, up_NF = h_NH.chunk(2, dim=1)
    return point.value(gate_NF, h_NH.new_empty(gate_NF.shape)).mul_(_lifted(point, up_NF))


def _activate_backward(point: Pointwise, gated: bool, h_NH: Tensor, dact_NF: Tensor, gate_N1: Tensor, dgate_N: Tensor) -> tuple[Tensor, Tensor]:
    """The activation times the gate, again, and the gradient of `h`.

    `dact_NF`, the gradient of their product before the gate, is overwritten; `dgate_N` is filled.
    """
    dh_NH = torch.empty_like(h_NH)
    if not gated:
        act_NF = point.value(h_NH, torch.empty_like(h_NH))
        torch.sum(torch.mul(dact_NF, act_NF, out=dh_NH), 1, out=dgate_N)
        point.slope(dact_NF.mul_(gate_N1), h_NH, dh_NH)
        return act_NF.mul_(gate_N1), dh_NH
    bent_NF, up_NF = h_NH.chunk(2, dim=1)
    dbent_NF, dup_NF = dh_NH.chunk(2, dim=1)
    curve_NF = point.value(bent_NF, torch.empty_like(dact_NF))
    lifted_NF = _lifted(point, up_NF)
    act_NF = curve_NF * lifted_NF
    torch.sum(torch.mul(dact_NF, act_NF, out=dup_NF), 1, out=dgate_N)
    dact_NF.mul_(gate_N1)
    torch.mul(dact_NF, curve_NF, out=dup_NF)
    if point.limit is not None:
        dup_NF.mul_(up_NF.abs() <= point.limit)
    point.slope(dact_NF.mul_(lifted_NF), bent_NF, dbent_NF)
    return act_NF.mul_(gate_N1), dh_NH
