"""The one place that chooses which implementation runs an operation on a device, and says which it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_cpu, attention_masked, experts_cpu, experts_grouped, experts_naive, experts_padded, launcher, rms_norm_cpu, router_naive
from kernels import expert_linear as linear
from kernels.given_cast import given

if TYPE_CHECKING:
    from kernels.grouped_gemm_triton import Tiles

TRITON_LACKS = launcher.lacking()  # asked once: a compiled layer must not look for programs
HAS_TRITON = TRITON_LACKS is None
WANTED = os.environ.get("MOELAB_EXPERTS") or None
"""What runs the experts on a CUDA device, whatever would be chosen: "triton", "grouped_mm" or "naive"."""


def expert_ffn(
    x_TD: Tensor,
    w_in_EHD: Tensor,
    w_out_EDF: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    activation: str,
    b_in_EH: Tensor | None = None,
    capacity: int | None = None,
    most_rows: int | None = None,
    lap: Callable[[str], None] | None = None,
    casts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y_t = sum_k gate_tk * FFN_expert_tk(x_t), with products in x's dtype; expert E stands for a dropped assignment.

    H is 2F (gate rows first) for gated activations, else F. Differentiable in all but `expert_TK` (int64). With a `capacity`, which no
    expert may exceed, every expert runs over exactly so many rows. `most_rows`: how many assignments can be other than dropped, where
    that is known to be fewer than T * K; it saves memory. `lap`, if given, is told as each part begins: dispatch, experts, combine;
    what one kernel does together is experts. `casts`: both weights in x's dtype, where somebody has cast them already.
    """
    which = _expert_ffn(x_TD.device.type, x_TD.dtype, padded=capacity is not None, aligned=is_aligned(*w_out_EDF.shape[1:]))
    if which == "cpu" and torch.compiler.is_compiling():
        from kernels import compiled

        return compiled.expert_ffn(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, b_in_EH)
    if which == "cpu":
        return experts_cpu.expert_ffn(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, b_in_EH, lap, casts)
    if lap is not None:
        lap("experts")
    if which == "triton":
        from kernels import experts_triton

        return experts_triton.expert_ffn(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, b_in_EH, most_rows, casts)
    if casts is not None:
        w_in_EHD, w_out_EDF = given(w_in_EHD, casts[0]), given(w_out_EDF, casts[1])
    if capacity is not None:
        return experts_padded.expert_ffn(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, b_in_EH, capacity=capacity)
    run = {"grouped_mm": experts_grouped.expert_ffn, "naive": experts_naive.expert_ffn}[which]
    return run(x_TD, w_in_EHD, w_out_EDF, expert_TK, gate_TK, activation, b_in_EH)


def is_aligned(*widths: int) -> bool:
    """Whether bfloat16 rows of these widths are multiples of the 16 bytes that torch's grouped products on CUDA want."""
    return all(width % 8 == 0 for width in widths)


def make_tiles(expert_TK: Tensor, n_experts: int, block_rows: int) -> Tiles:
    """Assignments sorted by expert and cut into tiles, for `expert_ffn` in Triton."""
    if expert_TK.device.type == "cuda":
        from kernels import tiles_triton

        return tiles_triton.make_tiles(expert_TK, n_experts, block_rows)
    from kernels import grouped_gemm_triton

    return grouped_gemm_triton.make_tiles(expert_TK, n_experts, block_rows)


def _expert_ffn(device: str, dtype: torch.dtype, *, padded: bool = False, aligned: bool = True) -> str:
    """The first of Triton, torch's grouped products and the loop that can; or the one that MOELAB_EXPERTS names (ValueError where that cannot)."""
    if padded or device == "cpu":
        return "padded" if padded else "cpu"
    can = {
        "triton": device == "cuda" and HAS_TRITON and dtype in (torch.bfloat16, torch.float16, torch.float32),
        "grouped_mm": device == "cuda" and dtype == torch.bfloat16 and aligned,
        "naive": True,
    }
    if WANTED is None:
        return next(name for name, able in can.items() if able)
    if not can.get(WANTED):
        ways = ", ".join(name for name, able in can.items() if able)
        lacks = f" (not Triton: {TRITON_LACKS})" if WANTED == "triton" and not HAS_TRITON else ""
        raise ValueError(f"MOELAB_EXPERTS is {WANTED!r}; what can run experts in {str(dtype).removeprefix('torch.')} on {device} here: {ways}{lacks}")
    return WANTED


def route(logits_TE: Tensor, bias_E: Tensor | None, rule: router_naive.Rule) -> router_naive.Routed:
    """The k experts of highest choice for every token, with their gates, counts and mean probabilities (see router_naive.route)."""
    if _route(logits_TE.device.type, logits_TE.dtype, logits_TE.shape[1], rule.top_k) == "triton":
        from kernels import router_triton

        return router_triton.route(logits_TE, bias_E, rule)
    return router_naive.route(logits_TE, bias_E, rule)


def _route(device: str, dtype: torch.dtype, n_experts: int, top_k: int) -> str:
    fits = dtype in (torch.float32, torch.bfloat16) and n_experts <= 1024 and top_k <= 32  # a tile holds whole rows
    return "triton" if device == "cuda" and fits and HAS_TRITON else "torch"


def attend(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor) -> Tensor:
    """Causal softmax attention, [B, H, S, V]; consecutive query heads share a key-value head.

    On CPUs torch's flash kernel is the faster one in float32, ours in bfloat16.
    """
    if q_BHSC.device.type == "cpu" and q_BHSC.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
        return attention_cpu.attend(q_BHSC, k_BGSC, v_BGSV)
    return F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSV, is_causal=True, enable_gqa=q_BHSC.shape[1] != k_BGSC.shape[1])


def attend_masked(
    q_BHSC: Tensor,
    k_BGPC: Tensor,
    v_BGPV: Tensor,
    sight: attention_masked.Sight,
    sink_H: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention to the keys in sight, [B, H, S, V]: windows, chunks, documents, a past, sinks, a scale (see attention_masked.attend)."""
    if torch.compiler.is_compiling():
        from kernels import compiled

        return compiled.attend_masked(q_BHSC, k_BGPC, v_BGPV, sight, sink_H, scale)
    return attention_masked.attend(q_BHSC, k_BGPC, v_BGPV, sight, sink_H, scale)


def expert_linear(x_RA: Tensor, w_EBA: Tensor, expert_R: Tensor) -> Tensor:
    """y_r = w[expert_r] x_r, [R, B], in x's dtype."""
    if torch.compiler.is_compiling():
        from kernels import compiled

        return compiled.expert_linear(x_RA, w_EBA, expert_R)
    return linear.expert_linear(x_RA, w_EBA, expert_R)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in x's dtype and given in `dtype`."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return rms_norm_cpu.rms_norm(x, weight_D, eps, dtype)
    return F.rms_norm(x, weight_D.shape, weight_D, eps).to(dtype)


def implementations(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    padded: bool = False,
    masked: bool = False,
    aligned: bool = True,
    compiled: bool = False,
    scored: tuple[int, int] | None = None,
) -> dict[str, str]:
    """Operation to the implementation that runs it on `device` for products in `dtype`; shown on the run page.

    `padded`: the experts run over exactly their capacity; `masked`: some attention is not plainly causal;
    `aligned`: see `is_aligned`, of the model's and the experts' widths; `compiled`: training's blocks go through torch.compile; `scored`: experts
    and k of a router that takes the k highest scores (others are plain torch). Where Triton would run but cannot, `triton` says why.
    """
    kind = torch.device(device).type
    ours = kind == "cpu" and not compiled
    return {
        "expert_ffn": _expert_ffn(kind, dtype, padded=padded, aligned=aligned),
        "router": "torch" if scored is None else _route(kind, torch.float32, *scored),
        "attention": "cpu" if ours and dtype == torch.bfloat16 else "sdpa",
        **({"attention (masked)": "blocks"} if masked else {}),
        "rms_norm": "cpu" if ours else "torch",
        **({"blocks": "torch.compile"} if compiled else {}),
        **({"triton": f"not used: {TRITON_LACKS}"} if kind == "cuda" and TRITON_LACKS else {}),
    }
