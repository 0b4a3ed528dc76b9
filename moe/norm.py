"""Normalisation layers: weights and arithmetic in float32, results in autocast's dtype where it is on, for the products that follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import dispatch
from spec.model import Model


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of `x` are made in: autocast's where it is on, else x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RmsNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) (Zhang 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return dispatch.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.weight, self.eps, product_dtype(x))


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in x's dtype: an RMS norm without weights (Llama 4's queries and keys)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class LayerNorm(nn.Module):
    """weight * (x - mean) / sqrt(var + eps), plus a bias where there is one (Ba 2016)."""

    def __init__(self, width: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        y = F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.weight.shape, self.weight, self.bias, self.eps)
        return y.to(product_dtype(x))


def build_norm(spec: Model, eps: float | None = None) -> nn.Module:
    """The model's normalisation of the residual stream, with its `norm_eps` unless `eps` is given."""
    if spec.norm == "rmsnorm":
        return RmsNorm(spec.d_model, eps or spec.norm_eps)
    return LayerNorm(spec.d_model, eps or spec.norm_eps, bias=spec.norm_bias)
