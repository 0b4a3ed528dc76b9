"""The feed-forward activations and their slopes inside Triton kernels: the twin of `activation.hidden`, names as there."""

# ruff: noqa: RET505 - Triton compiles only the branch of a constant condition, and only if it is written as one
from __future__ import annotations

import triton
import triton.language as tl

_INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
_INVERSE_ROOT_TAU = tl.constexpr(0.3989422804014327)
_LIMIT = tl.constexpr(7.0)
_STEEPNESS = tl.constexpr(1.702)


@triton.jit
def value(gate, up, ACTIVATION: tl.constexpr):
    """act(gate) * up; the ungated activations ignore `up`."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "swiglu_clamped":
        gate = tl.minimum(gate, _LIMIT)
        return gate * tl.sigmoid(gate * _STEEPNESS) * (tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1)
    elif ACTIVATION == "geglu":
        return 0.5 * gate * (1 + tl.erf(gate * _INVERSE_ROOT_2)) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * _INVERSE_ROOT_2))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(gate, 0.0)


@triton.jit
def slopes(gate, up, d, ACTIVATION: tl.constexpr):
    """The gradients of gate and up where `d` is that of `value`; the second is meaningless for the ungated ones."""
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(gate)
        curve = gate * sigmoid
        return d * up * (sigmoid + curve * (1 - sigmoid)), d * curve
    elif ACTIVATION == "swiglu_clamped":
        low = tl.minimum(gate, _LIMIT)
        sigmoid = tl.sigmoid(low * _STEEPNESS)
        curve = low * sigmoid
        lifted = tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1
        dgate = d * lifted * (sigmoid + curve * (1 - sigmoid) * _STEEPNESS)
        return tl.where(gate <= _LIMIT, dgate, 0.0), tl.where((up >= -_LIMIT) & (up <= _LIMIT), d * curve, 0.0)
    elif ACTIVATION == "relu":
        return tl.where(gate > 0, d, 0.0), d
    else:
        share = 0.5 * (1 + tl.erf(gate * _INVERSE_ROOT_2))
        slope = share + gate * _INVERSE_ROOT_TAU * tl.exp(-0.5 * gate * gate)
        if ACTIVATION == "geglu":
            return d * up * slope, d * gate * share
        else:
            tl.static_assert(ACTIVATION == "gelu")
            return d * slope, d
