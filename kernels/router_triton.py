"""Scores to a choice of experts in one pass over the logits, in Triton, forward and backward. Nothing here waits for the device.

One kernel makes scores, limits groups, takes the k highest, makes their gates, and counts: sums over tokens are kept per program and added in
a fixed order, so no atomics. The k highest are found in k rounds over integer keys that order as the float32 choices do, to the last
bit: equal ones go to the lower expert. The backward kernel makes scores again from the logits, the only [T, E] that is kept.

Letters: T tokens, E experts, K chosen per token, G groups of experts, S experts in a group, P programs, each of which has its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.router_naive import LOWEST_SUM, Routed, Rule

MOST_PROGRAMS = 2048
TAKEN = tl.constexpr(-(2**31))  # a key below that of every number
_LOWEST_SUM = tl.constexpr(LOWEST_SUM)


@triton.jit
def _key(x):
    """int32 in the order of float32 `x`, above TAKEN: NaN is highest, as in torch's top-k, and -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def _number(key):
    """The float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _scores(x, valid, SIGMOID: tl.constexpr):
    """Scores of a tile of logits; with the maximum and the sum that make a softmax of any logit of the row."""
    if SIGMOID:
        score = tl.where(valid, tl.sigmoid(x), 0.0)
        return score, tl.zeros_like(tl.max(x, 1)), tl.sum(score, 1)
    top = tl.max(tl.where(valid, x, float("-inf")), 1)
    power = tl.where(valid, tl.exp(x - top[:, None]), 0.0)
    total = tl.sum(power, 1)
    return power / total[:, None], top, total


@triton.jit
def _chosen_scores(x, fits, top, total, SIGMOID: tl.constexpr):
    """`_scores` of logits that were picked out of rows."""
    score = tl.sigmoid(x) if SIGMOID else tl.exp(x - top[:, None]) / total[:, None]
    return tl.where(fits, score, 0.0)


@triton.jit
def _columns(N_EXPERTS: tl.constexpr, N_GROUPS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """The expert of each column of a tile, in which every group fills MEMBERS columns, and which columns have one."""
    column = tl.arange(0, GROUPS * MEMBERS)
    member = column % MEMBERS
    size: tl.constexpr = N_EXPERTS // N_GROUPS
    expert = (column // MEMBERS) * size + member
    return expert, (member < size) & (column // MEMBERS < N_GROUPS)


@triton.jit
def _kept_groups(choice, valid, ROWS: tl.constexpr, N_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
                 MEMBERS: tl.constexpr, TOP2_SUM: tl.constexpr, rounded: tl.constexpr):  # fmt: skip
    """Which columns are in one of the row's best groups."""
    key = tl.reshape(tl.where(valid, _key(choice), TAKEN), (ROWS, GROUPS, MEMBERS))
    best = tl.max(key, 2)
    group = tl.arange(0, GROUPS)[None, :]
    if TOP2_SUM:
        member = tl.arange(0, MEMBERS)[None, None, :]
        at = tl.min(tl.where(key == best[:, :, None], member, MEMBERS), 2)
        second = tl.max(tl.where(member == at[:, :, None], TAKEN, key), 2)
        best = _key((_number(best) + _number(second)).to(rounded).to(tl.float32))
    best = tl.where(group < N_GROUPS, best, TAKEN)
    for _ in range(TOP_GROUPS):
        highest = tl.max(best, 1)
        next_one = tl.min(tl.where(best == highest[:, None], group, GROUPS), 1)
        best = tl.where(group == next_one[:, None], TAKEN, best)
    kept = tl.broadcast_to(((best == TAKEN) & (group < N_GROUPS)).to(tl.int32)[:, :, None], (ROWS, GROUPS, MEMBERS))
    return tl.reshape(kept, (ROWS, GROUPS * MEMBERS)) != 0


@triton.jit
def _route(
    logits, bias, prob, score_out, choice_out, expert_out, gate_out, count_out, sum_out,
    n_tokens, n_steps, stride, scale,
    N_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, GATE: tl.constexpr, BY_LOGIT: tl.constexpr, BIASED: tl.constexpr,
    N_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2_SUM: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """All of `Routed` but the final sums. GROUPS x MEMBERS and SLOTS are groups, experts of a group and K, padded to powers of two."""
    kind: tl.constexpr = logits.dtype.element_ty
    expert, valid = _columns(N_EXPERTS, N_GROUPS, GROUPS, MEMBERS)
    slot = tl.arange(0, SLOTS)[None, :]
    count = tl.zeros((ROWS, GROUPS * MEMBERS), dtype=tl.int32)
    prob_sum = tl.zeros((ROWS, GROUPS * MEMBERS), dtype=tl.float32)
    for step in range(n_steps):
        token = (tl.program_id(0) * n_steps + step) * ROWS + tl.arange(0, ROWS)
        row_fits = token < n_tokens
        fits = row_fits[:, None] & valid[None, :]
        wide = token.to(tl.int64)[:, None]
        x = tl.load(logits + wide * stride + expert[None, :], mask=fits, other=0.0).to(tl.float32)
        score, top, total = _scores(x, valid[None, :], SIGMOID)
        score = score.to(kind).to(tl.float32)
        share = score
        if SIGMOID:
            tl.store(score_out + wide * N_EXPERTS + expert[None, :], score.to(kind), mask=fits)
            share = (score / tl.maximum(total, _LOWEST_SUM)[:, None]).to(kind).to(tl.float32)
        tl.store(prob + wide * N_EXPERTS + expert[None, :], share.to(kind), mask=fits)
        prob_sum += tl.where(fits, share, 0.0)
        choice = x if BY_LOGIT else score
        if BIASED:
            choice += tl.load(bias + expert, mask=valid, other=0.0).to(tl.float32)[None, :]
        if TOP_GROUPS < N_GROUPS:
            # Sums of two are rounded where torch's are: to the choice's dtype.
            kept = _kept_groups(
                choice, valid[None, :], ROWS, N_GROUPS, TOP_GROUPS, GROUPS, MEMBERS, TOP2_SUM, choice_out.dtype.element_ty
            )  # fmt: skip
            choice = tl.where(kept, choice, float("-inf"))
        if BIASED or TOP_GROUPS < N_GROUPS:
            tl.store(choice_out + wide * N_EXPERTS + expert[None, :], choice.to(choice_out.dtype.element_ty), mask=fits)
        key = tl.where(valid[None, :], _key(choice), TAKEN)
        chosen = tl.zeros((ROWS, SLOTS), dtype=tl.int32)
        for k in range(TOP_K):
            highest = tl.max(key, 1)
            at = tl.min(tl.where(key == highest[:, None], expert[None, :], N_EXPERTS), 1)
            key = tl.where(expert[None, :] == at[:, None], TAKEN, key)
            chosen = tl.where(slot == k, at[:, None], chosen)
        count += (fits & (key == TAKEN)).to(tl.int32)
        slot_fits = row_fits[:, None] & (slot < TOP_K)
        tl.store(expert_out + wide * TOP_K + slot, chosen.to(tl.int64), mask=slot_fits)
        # Picked from memory: where a bias or groups decide, the highest choice is not the score.
        picked = tl.load(logits + wide * stride + chosen, mask=slot_fits, other=0.0).to(tl.float32)
        if GATE == "softmax":
            gate, _, _ = _scores(picked, slot < TOP_K, False)
        else:
            gate = _chosen_scores(picked, slot < TOP_K, top, total, SIGMOID).to(kind).to(tl.float32)
            if GATE == "normalised":
                gate = gate / tl.maximum(tl.sum(gate, 1), _LOWEST_SUM)[:, None]
        tl.store(gate_out + wide * TOP_K + slot, (gate * scale).to(kind), mask=slot_fits)
    part = tl.program_id(0).to(tl.int64) * N_EXPERTS + expert
    tl.store(count_out + part, tl.sum(count, 0), mask=valid)
    tl.store(sum_out + part, tl.sum(prob_sum, 0), mask=valid)


@triton.jit
def _route_backward(
    logits, expert_in, dgate, dprob, dscore, dmean, dlogits,
    n_tokens, stride, stride_gt, stride_gk, stride_pt, stride_pe, stride_st, stride_se, scale,
    N_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIGMOID: tl.constexpr, GATE: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_PROB: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_MEAN: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The logits' gradient from those of gates, probabilities, scores and mean probabilities, as far as there are any."""
    expert = tl.arange(0, COLUMNS)
    valid = (expert < N_EXPERTS)[None, :]
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_fits = token < n_tokens
    fits = row_fits[:, None] & valid
    wide = token.to(tl.int64)[:, None]
    x = tl.load(logits + wide * stride + expert[None, :], mask=fits, other=0.0).to(tl.float32)
    score, top, total = _scores(x, valid, SIGMOID)
    d = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_PROB:
        d += tl.load(dprob + wide * stride_pt + expert[None, :] * stride_pe, mask=fits, other=0.0).to(tl.float32)
    if HAS_MEAN:
        d += tl.where(fits, tl.load(dmean + expert, mask=expert < N_EXPERTS, other=0.0).to(tl.float32)[None, :] / n_tokens, 0.0)
    if SIGMOID and (HAS_PROB or HAS_MEAN):
        size = tl.maximum(total, _LOWEST_SUM)
        common = tl.where(total >= _LOWEST_SUM, tl.sum(d * score, 1) / size, 0.0)
        d = (d - common[:, None]) / size[:, None]
    if HAS_SCORE:
        d += tl.load(dscore + wide * stride_st + expert[None, :] * stride_se, mask=fits, other=0.0).to(tl.float32)
    spread = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_GATE:
        slot = tl.arange(0, SLOTS)[None, :]
        slot_fits = row_fits[:, None] & (slot < TOP_K)
        chosen = tl.load(expert_in + wide * TOP_K + slot, mask=slot_fits, other=0).to(tl.int32)
        picked = tl.load(logits + wide * stride + chosen, mask=slot_fits, other=0.0).to(tl.float32)
        dchosen = tl.load(dgate + wide * stride_gt + slot * stride_gk, mask=slot_fits, other=0.0).to(tl.float32) * scale
        if GATE == "softmax":
            gate, _, _ = _scores(picked, slot < TOP_K, False)
            dchosen = gate * (dchosen - tl.sum(dchosen * gate, 1)[:, None])
        elif GATE == "normalised":
            kept = _chosen_scores(picked, slot < TOP_K, top, total, SIGMOID)
            whole = tl.sum(kept, 1)
            size = tl.maximum(whole, _LOWEST_SUM)
            common = tl.where(whole >= _LOWEST_SUM, tl.sum(dchosen * kept, 1) / size, 0.0)
            dchosen = (dchosen - common[:, None]) / size[:, None]
        for k in range(TOP_K):
            at = tl.sum(tl.where(slot == k, chosen, 0), 1)
            part = tl.sum(tl.where(slot == k, dchosen, 0.0), 1)
            spread += tl.where(expert[None, :] == at[:, None], part[:, None], 0.0)
        if GATE != "softmax":
            d += spread
    if SIGMOID:
        d = score * (1.0 - score) * d
    else:
        d = score * (d - tl.sum(tl.where(fits, score * d, 0.0), 1)[:, None])
    if GATE == "softmax":
        d += spread
    tl.store(dlogits + wide * N_EXPERTS + expert[None, :], d.to(dlogits.dtype.element_ty), mask=fits)


def shape(columns: int) -> dict[str, int]:
    """Rows of a tile, and warps: up to 512 columns a warp has whole rows, which spares the exchange between warps in every round.

    One warp alone with 1,024 columns spilled 40 bytes a thread on sm_80.
    """
    if columns <= 128:
        return {"ROWS": min(32, 2048 // columns), "num_warps": 4}
    return {"ROWS": max(1, 512 // columns), "num_warps": max(1, columns // 512)}


def constants(rule: Rule, n_experts: int) -> dict[str, Any]:
    """What the forward kernel is compiled for."""
    n_groups = rule.n_groups if rule.limited else 1
    groups, members = triton.next_power_of_2(n_groups), triton.next_power_of_2(n_experts // n_groups)
    return {
        "N_EXPERTS": n_experts, "TOP_K": rule.top_k, "SIGMOID": rule.score == "sigmoid", "GATE": rule.gate, "BY_LOGIT": rule.by_logit,
        "N_GROUPS": n_groups, "TOP_GROUPS": min(rule.top_groups, n_groups), "TOP2_SUM": rule.group_score == "top2_sum",
        "GROUPS": groups, "MEMBERS": members, "SLOTS": triton.next_power_of_2(rule.top_k), **shape(groups * members),
    }  # fmt: skip


def constants_backward(rule: Rule, n_experts: int) -> dict[str, Any]:
    """What the backward kernel is compiled for, but for which gradients there are."""
    columns = triton.next_power_of_2(n_experts)
    slots = triton.next_power_of_2(rule.top_k)
    found = {"N_EXPERTS": n_experts, "TOP_K": rule.top_k, "SIGMOID": rule.score == "sigmoid", "GATE": rule.gate, "SLOTS": slots}
    return {**found, "COLUMNS": columns, **shape(columns)}


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: Rule) -> Routed:
    """As `router_naive.route`, for logits that the kernels cover; equal choices go to the lower expert."""
    prob_TE, score_TE, choice_TE, expert_TK, gate_TK, count_E, prob_E = _route_op(logits_TE, bias_E, *rule)
    if rule.score == "softmax":
        score_TE = prob_TE
    if bias_E is None and not rule.limited:
        choice_TE = (logits_TE if rule.by_logit else score_TE).detach()
    return Routed(prob_TE, expert_TK, gate_TK, score_TE, choice_TE, count_E, prob_E)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, limited: bool) -> tuple[Tensor, ...]:
    """Room for probabilities, scores and choices where they are tensors of their own ([0, E] where not), experts and gates."""
    n_tokens, n_experts = logits_TE.shape
    like, kind = logits_TE.new_empty, logits_TE.dtype
    own_choice = bias_E is not None or limited
    return (
        like(n_tokens, n_experts),
        like(n_tokens if score == "sigmoid" else 0, n_experts),
        like(n_tokens if own_choice else 0, n_experts, dtype=kind if bias_E is None else torch.float32),
        like(n_tokens, top_k, dtype=torch.int64),
        like(n_tokens, top_k),
    )


@torch.library.custom_op("moelab::route", mutates_args=())
def _route_op(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, gate: str, by_logit: bool, scale: float,
    n_groups: int, top_groups: int, group_score: str,
) -> Outputs:  # fmt: skip
    """Probabilities, scores and choices (empty where they are others'), experts, gates, counts and mean probabilities."""
    rule = Rule(top_k, score, gate, by_logit, scale, n_groups, top_groups, group_score)  # type: ignore[arg-type]
    n_tokens, n_experts = logits_TE.shape
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k {top_k} of {n_experts} experts")
    found = _outputs(logits_TE, bias_E, top_k, score, rule.limited)
    logits_TE = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    given = constants(rule, n_experts)
    n_steps = triton.cdiv(n_tokens, given["ROWS"] * MOST_PROGRAMS)
    n_programs = triton.cdiv(n_tokens, given["ROWS"] * n_steps) if n_tokens else 0
    count_PE = torch.empty(n_programs, n_experts, dtype=torch.int32, device=logits_TE.device)
    sum_PE = torch.empty(n_programs, n_experts, dtype=torch.float32, device=logits_TE.device)
    if n_programs:
        _route[(n_programs,)](
            logits_TE, logits_TE if bias_E is None else bias_E.contiguous(), *found, count_PE, sum_PE,
            n_tokens, n_steps, logits_TE.stride(0), scale, BIASED=bias_E is not None, **given,
        )  # fmt: skip
    prob_TE, score_TE, choice_TE, expert_TK, gate_TK = found
    return prob_TE, score_TE, choice_TE, expert_TK, gate_TK, count_PE.sum(0), sum_PE.sum(0) / n_tokens


@_route_op.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, gate: str, by_logit: bool, scale: float,
    n_groups: int, top_groups: int, group_score: str,
) -> Outputs:  # fmt: skip
    prob_TE, score_TE, choice_TE, expert_TK, gate_TK = _outputs(logits_TE, bias_E, top_k, score, top_groups < n_groups)
    n_experts = logits_TE.shape[1]
    count_E, prob_E = logits_TE.new_empty(n_experts, dtype=torch.int64), logits_TE.new_empty(n_experts, dtype=torch.float32)
    return prob_TE, score_TE, choice_TE, expert_TK, gate_TK, count_E, prob_E


@torch.library.custom_op("moelab::route_backward", mutates_args=())
def _route_backward_op(
    logits_TE: Tensor, expert_TK: Tensor, dgate_TK: Tensor | None, dprob_TE: Tensor | None, dscore_TE: Tensor | None, dprob_E: Tensor | None,
    score: str, gate: str, scale: float,
) -> Tensor:  # fmt: skip
    """The gradient of the logits."""
    (n_tokens, n_experts), top_k = logits_TE.shape, expert_TK.shape[1]
    dlogits_TE = torch.empty(n_tokens, n_experts, dtype=logits_TE.dtype, device=logits_TE.device)
    logits_TE = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    given = constants_backward(Rule(top_k, score, gate), n_experts)  # type: ignore[arg-type]
    gradients = {"GATE": dgate_TK, "PROB": dprob_TE, "SCORE": dscore_TE, "MEAN": dprob_E}
    present = {f"HAS_{name}": gradient is not None for name, gradient in gradients.items()}
    # An absent one is not read. A mean's gradient has stride 0 over tokens: it is read as it is, not copied out.
    dgate_TK, dprob_TE, dscore_TE, dprob_E = (logits_TE if gradient is None else gradient for gradient in gradients.values())
    if n_tokens:
        _route_backward[(triton.cdiv(n_tokens, given["ROWS"]),)](
            logits_TE, expert_TK.contiguous(), dgate_TK, dprob_TE, dscore_TE, dprob_E.contiguous(), dlogits_TE,
            n_tokens, logits_TE.stride(0), *dgate_TK.stride(), *dprob_TE.stride(), *dscore_TE.stride(), scale, **present, **given,
        )  # fmt: skip
    return dlogits_TE


@_route_backward_op.register_fake
def _(
    logits_TE: Tensor, expert_TK: Tensor, dgate_TK: Tensor | None, dprob_TE: Tensor | None, dscore_TE: Tensor | None, dprob_E: Tensor | None,
    score: str, gate: str, scale: float,
) -> Tensor:  # fmt: skip
    return logits_TE.new_empty(logits_TE.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    logits_TE, _, _, ctx.score, ctx.gate, _, ctx.scale, *_ = inputs
    _, _, choice_TE, expert_TK, _, count_E, _ = output
    ctx.save_for_backward(logits_TE, expert_TK)
    ctx.mark_non_differentiable(choice_TE, expert_TK, count_E)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    dprob_TE: Tensor | None,
    dscore_TE: Tensor | None,
    _choice: None,
    _expert: None,
    dgate_TK: Tensor | None,
    _count: None,
    dprob_E: Tensor | None,
) -> tuple[Tensor | None, ...]:
    logits_TE, expert_TK = ctx.saved_tensors
    dscore_TE = dscore_TE if ctx.score == "sigmoid" else None  # else there is no such output
    return _route_backward_op(logits_TE, expert_TK, dgate_TK, dprob_TE, dscore_TE, dprob_E, ctx.score, ctx.gate, ctx.scale), *[None] * 9


_route_op.register_autograd(_backward, setup_context=_keep)
