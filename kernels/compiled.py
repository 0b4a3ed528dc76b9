"""Operations that torch.compile is to leave whole: loops over experts or blocks of queries, each as one operation of `torch.library`.

They call the very functions of the modules that they stand for. Without the compiler these run as autograd functions: a third of the
call's cost, and torch's compiler, a second of every start, is not imported.

Letters as in `experts_cpu` and `attention_masked`; M most rows that any routing needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import attention_masked, experts_cpu
from kernels import expert_linear as linear
from kernels.attention_masked import Sight
from kernels.plan import make_plan


def expert_ffn(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, expert_TK: Tensor, gate_TK: Tensor, activation: str, b_in_EH: Tensor | None = None
) -> Tensor:
    """`experts_cpu.expert_ffn`."""
    y_TD, _ = _experts(x_TD, w_in_EHD, w_out_EDF, gate_TK, b_in_EH, expert_TK, activation)
    return y_TD


def _most_rows(x_TD: Tensor, w_in_EHD: Tensor, expert_TK: Tensor) -> int:
    return expert_TK.numel() + len(w_in_EHD) * (experts_cpu.multiple(x_TD.dtype) - 1)


@torch.library.custom_op("moelab::experts_cpu", mutates_args=())
def _experts(
    x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, gate_TK: Tensor, b_in_EH: Tensor | None, expert_TK: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The layer's output and the up-projection's, [M, H], whose last rows nobody wrote."""
    plan = make_plan(expert_TK, len(w_in_EHD), experts_cpu.multiple(x_TD.dtype))
    h_MH = x_TD.new_empty(_most_rows(x_TD, w_in_EHD, expert_TK), w_in_EHD.shape[1])
    return experts_cpu.forward(x_TD, w_in_EHD.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype), gate_TK, b_in_EH, plan, activation, h_MH[: plan.n_rows]), h_MH


@_experts.register_fake
def _(x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, gate_TK: Tensor, b_in_EH: Tensor | None, expert_TK: Tensor, _: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), x_TD.new_empty(_most_rows(x_TD, w_in_EHD, expert_TK), w_in_EHD.shape[1])


@torch.library.custom_op("moelab::experts_cpu_backward", mutates_args=())
def _experts_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    gate_TK: Tensor,
    b_in_EH: Tensor | None,
    expert_TK: Tensor,
    h_MH: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first five inputs of `_experts`; an empty one where there is no bias."""
    plan = make_plan(expert_TK, len(w_in_EHD), experts_cpu.multiple(x_TD.dtype))
    dtypes = experts_cpu.Dtypes(w_in_EHD.dtype, w_out_EDF.dtype, gate_TK.dtype, None if b_in_EH is None else b_in_EH.dtype)
    w_in, w_out = w_in_EHD.to(x_TD.dtype), w_out_EDF.to(x_TD.dtype)
    *others, db_in_EH = experts_cpu.backward(dy_TD, x_TD, w_in, w_out, gate_TK, h_MH[: plan.n_rows], plan, activation, dtypes)
    return *others, x_TD.new_empty(0) if db_in_EH is None else db_in_EH


@_experts_backward.register_fake
def _(dy_TD: Tensor, x_TD: Tensor, w_in_EHD: Tensor, w_out_EDF: Tensor, gate_TK: Tensor, b_in_EH: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    bias = x_TD.new_empty(0) if b_in_EH is None else torch.empty_like(b_in_EH)
    return torch.empty_like(x_TD), torch.empty_like(w_in_EHD), torch.empty_like(w_out_EDF), torch.empty_like(gate_TK), bias


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or H would get a gradient of zeros, as large as itself


def _gradients_of_experts(ctx: Any, dy_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: where activations are recomputed, this does it
    if dy_TD is None:
        return (None,) * 7
    *gradients, db_in_EH = _experts_backward(dy_TD, *saved, ctx.activation)
    return *gradients, db_in_EH if saved[4] is not None else None, None, None


_experts.register_autograd(_gradients_of_experts, setup_context=_keep_experts)


@torch.library.custom_op("moelab::expert_linear", mutates_args=())
def expert_linear(x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> Tensor:
    """`expert_linear.expert_linear`."""
    return linear.expert_linear(x_RA, w_EBA, expert_R)


@expert_linear.register_fake
def _(x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> Tensor:
    return x_RA.new_empty(len(x_RA), w_EBA.shape[1])


@torch.library.custom_op("moelab::expert_linear_backward", mutates_args=())
def _linear_backward(dy_RB: Tensor, x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> tuple[Tensor, Tensor]:
    return linear.gradients(dy_RB, x_RA, w_EBA, expert_R)


@_linear_backward.register_fake
def _(dy_RB: Tensor, x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RA), torch.empty_like(w_EBA)


expert_linear.register_autograd(
    lambda ctx, dy_RB: (*_linear_backward(dy_RB, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def attend_masked(q_BHSC: Tensor, k_BGPC: Tensor, v_BGPV: Tensor, sight: Sight, sink_H: Tensor | None = None, scale: float | None = None) -> Tensor:
    """`attention_masked.attend`."""
    n_kv_heads = k_BGPC.shape[1]
    q_NJSC = q_BHSC.unflatten(1, (n_kv_heads, -1)).flatten(0, 1)
    scale = q_BHSC.shape[-1] ** -0.5 if scale is None else scale
    limits = [sight.start, *(-1 if limit is None else limit for limit in (sight.window, sight.chunk))]
    y_NJSV = _masked(q_NJSC, k_BGPC.flatten(0, 1), v_BGPV.flatten(0, 1), sink_H, sight.document_BP, limits, scale)
    return y_NJSV.unflatten(0, (-1, n_kv_heads)).flatten(1, 2)


def _sight(document_BP: Tensor | None, limits: list[int]) -> Sight:
    start, window, chunk = limits
    return Sight(start, None if window < 0 else window, None if chunk < 0 else chunk, document_BP)


@torch.library.custom_op("moelab::attention_masked", mutates_args=())
def _masked(
    q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, sink_H: Tensor | None, document_BP: Tensor | None, limits: list[int], scale: float
) -> Tensor:
    """`limits`: the start, the window and the chunk, -1 for none."""
    return attention_masked.forward(q_NJSC, k_NPC, v_NPV, sink_H, _sight(document_BP, limits), scale)


@_masked.register_fake
def _(q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, *_: Any) -> Tensor:
    return q_NJSC.new_empty(*q_NJSC.shape[:3], v_NPV.shape[2])


@torch.library.custom_op("moelab::attention_masked_backward", mutates_args=())
def _masked_backward(
    dy_NJSV: Tensor, q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, sink_H: Tensor | None, document_BP: Tensor | None, limits: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first four inputs of `_masked`; an empty one where there are no sinks."""
    *others, dsink_H = attention_masked.backward(dy_NJSV, q_NJSC, k_NPC, v_NPV, sink_H, _sight(document_BP, limits), scale)
    return *others, q_NJSC.new_empty(0) if dsink_H is None else dsink_H


@_masked_backward.register_fake
def _(dy_NJSV: Tensor, q_NJSC: Tensor, k_NPC: Tensor, v_NPV: Tensor, sink_H: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return *map(torch.empty_like, (q_NJSC, k_NPC, v_NPV)), q_NJSC.new_empty(0) if sink_H is None else torch.empty_like(sink_H)


def _keep_masked(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.limits, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients_of_masked(ctx: Any, dy_NJSV: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv, dsink_H = _masked_backward(dy_NJSV, *saved, ctx.limits, ctx.scale)
    return dq, dk, dv, dsink_H if saved[3] is not None else None, None, None, None


_masked.register_autograd(_gradients_of_masked, setup_context=_keep_masked)
