"""The Triton layer inside torch's checkpoint, which lets saved tensors be taken once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from kernels import experts_triton
from tests.kernels.routing import choose


@pytest.mark.parametrize("biased", [False, True])
def test_recomputed_it_has_the_same_gradients(biased):
    torch.manual_seed(0)
    x, gate = torch.randn(21, 16, requires_grad=True), torch.rand(21, 2, requires_grad=True)
    w_in, w_out = torch.randn(4, 16, 16, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
    b_in = torch.randn(4, 16, requires_grad=True) if biased else None
    inputs = [tensor for tensor in (x, gate, w_in, w_out, b_in) if tensor is not None]
    given = (x, w_in, w_out, choose("dropped", 21, 2, 4), gate, "swiglu", b_in)
    plain = experts_triton.expert_ffn(*given)
    again = checkpoint(experts_triton.expert_ffn, *given, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(plain.square().sum(), inputs), torch.autograd.grad(again.square().sum(), inputs), strict=True):
        assert torch.equal(a, b)
