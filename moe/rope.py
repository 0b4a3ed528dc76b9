"""Rotary positions (Su 2021), and how they reach beyond the trained length. Letters: B sequences, S tokens, H heads, R rotated dimensions.

Rotary pairs are neighbours, as in the paper; transformers' Llama and its kin pair dimension i with i + R/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spec.attention import LongRopeScaling, RopeScaling, YarnScaling
from spec.model import Model


class Rope:
    """The rotation of positions start .. start + S - 1: complex numbers [S, 1, R/2], exact to float32; units but for scalings with a factor."""

    def __init__(
        self,
        length: int,
        width: int,
        theta: float,
        device: torch.device,
        *,
        start: int = 0,
        scaling: RopeScaling | None = None,
        most: int | None = None,
    ) -> None:
        """`most` is the number of positions that there will be in the end, by which longrope chooses; start + length unless it is given."""
        inverse = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
        factor = 1.0
        if scaling is not None:
            inverse, factor = scaled(inverse, scaling, theta, most or start + length)
        angle = torch.outer(torch.arange(start, start + length, device=device, dtype=torch.float32), inverse)[:, None]
        self.turn = torch.polar(torch.full_like(angle, factor), angle)
        self.cos, self.sin = torch.view_as_real(self.turn).unbind(-1)

    def rotate(self, x_BSHR: Tensor) -> Tensor:
        """`x`, whose dimensions (2i, 2i + 1) are the parts of a complex number, turned by its position's angles (Su 2021, eq. 34).

        A shorter `x` has the first of the positions.
        """
        pairs = x_BSHR.to(torch.promote_types(x_BSHR.dtype, torch.float32)).unflatten(-1, (-1, 2))
        length = x_BSHR.shape[1]
        # Of a single vector a gradient may begin at an odd place, where torch sees no complex number.
        single = x_BSHR.requires_grad and x_BSHR.numel() == x_BSHR.shape[-1]
        if pairs.device.type == "cpu" and not single and not torch.compiler.is_compiling():
            if pairs.storage_offset() % 2 or any(stride % 2 for stride in pairs.stride()[:-1]):
                pairs = pairs.clone(memory_format=torch.contiguous_format)  # beside an odd number of other dimensions no pair is a complex number
            turned = torch.view_as_real(torch.view_as_complex(pairs) * self.turn[:length])  # one pass over memory
        else:
            (first, second), cos, sin = pairs.unbind(-1), self.cos[:length], self.sin[:length]
            turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
        return turned.flatten(-2).to(x_BSHR.dtype)


def scaled(inverse_F: Tensor, scaling: RopeScaling, theta: float, most: int) -> tuple[Tensor, float]:
    """The frequencies [R/2], in radians per position, as `scaling` changes them, and the factor on cosines and sines."""
    if scaling.kind == "linear":
        return inverse_F / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns_F = scaling.trained_len * inverse_F / (2 * math.pi)
        ramp = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-9)  # Llama 4 Scout has a step instead: 1 and 1
        kept_F = ((turns_F - scaling.low_freq_factor) / ramp).clamp(0, 1)
        return inverse_F * (kept_F + (1 - kept_F) / scaling.factor), 1.0
    if scaling.kind == "yarn":
        stretched_F = _ramp(scaling, theta, inverse_F)
        return inverse_F * (1 - stretched_F + stretched_F / scaling.factor), _yarn_factor(scaling)
    long = most > scaling.trained_len
    divisor_F = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=inverse_F.dtype, device=inverse_F.device)
    return inverse_F / divisor_F, (scaling.long_mscale if long else scaling.short_mscale) or _longrope_factor(scaling)


def _ramp(scaling: YarnScaling, theta: float, inverse_F: Tensor) -> Tensor:
    """Share of each frequency that is stretched: 0 above beta_fast turns in the trained length, 1 below beta_slow (Peng 2023, section 3.2)."""
    width = 2 * len(inverse_F)

    def dimension(turns: float) -> float:
        return width * math.log(scaling.trained_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    index_F = torch.arange(len(inverse_F), dtype=inverse_F.dtype, device=inverse_F.device)
    return ((index_F - first) / ((last - first) or 0.001)).clamp(0, 1)


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1 (Peng 2023, eq. 22; the weight is DeepSeek's)."""
    return 0.1 * weight * math.log(factor) + 1


def _yarn_factor(scaling: YarnScaling) -> float:
    if not scaling.mscale:
        return yarn_mscale(scaling.factor)
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def _longrope_factor(scaling: LongRopeScaling) -> float:
    """sqrt(1 + ln(longest / trained) / ln(trained)) (Ding 2024)."""
    stretch = scaling.max_len / scaling.trained_len
    return math.sqrt(1 + math.log(stretch) / math.log(scaling.trained_len)) if stretch > 1 else 1.0


def attention_scale(spec: Model, width: int) -> float | None:
    """Factor on the scores of heads of `width` dimensions where it is not 1 / sqrt(width): DeepSeek's correction beside YaRN; None elsewhere."""
    scaling = spec.rope_scaling
    if scaling is None or scaling.kind != "yarn" or not scaling.mscale_all_dim:
        return None
    return float(width**-0.5 * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2)


def rotated_width(spec: Model) -> int:
    """Dimensions of a head that carry rotary position."""
    return spec.attention.qk_rope_head_dim if spec.attention.kind == "mla" else spec.head_dim
