"""Softmax attention over the keys in sight, by the fastest operation that there is for it.

Letters: B sequences, S tokens, P keys up to the last of them, H query heads, G key-value heads, C dimensions of a head (V of a value).
"""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch
from kernels.attention_masked import Sight
from moe.context import Context


def attend(q_BSHC: Tensor, k_BPGC: Tensor, v_BPGV: Tensor, sight: Sight, sink_H: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention of the last S positions; [B, S, H * V]. Key-value heads are shared by consecutive query heads."""
    q_BHSC, k_BGPC, v_BGPV = q_BSHC.transpose(1, 2), k_BPGC.transpose(1, 2), v_BPGV.transpose(1, 2)
    if sink_H is None and scale is None and sight.is_causal(q_BSHC.shape[1], k_BPGC.shape[1]):
        y_BHSV = dispatch.attend(q_BHSC, k_BGPC, v_BGPV)
    else:
        y_BHSV = dispatch.attend_masked(q_BHSC, k_BGPC, v_BGPV, sight, sink_H, scale)
    return y_BHSV.transpose(1, 2).flatten(2)


def sight_of(context: Context, n_keys: int, window: int | None = None, chunk: int | None = None) -> Sight:
    """What the pass's tokens see of `n_keys` keys, the last of which are their own."""
    document_BP = None if context.document_BP is None else context.document_BP[:, -n_keys:]
    return Sight(context.start, window, chunk, document_BP)
