"""The operations that the compiler leaves whole are those that run without it, and are registered as torch asks."""

from __future__ import annotations

import pytest
import torch

from kernels import attention_masked, compiled, expert_linear, experts_cpu
from kernels.attention_masked import Sight
from tests.kernels.routing import KINDS, choose


def equal(ours, theirs, inputs) -> None:
    """The same output and gradients, to the bit."""
    slope = torch.randn_like(theirs)
    assert torch.equal(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, inputs, slope), torch.autograd.grad(theirs, inputs, slope), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(kind, biased, dtype):
    torch.manual_seed(0)
    x = torch.randn(33, 16, dtype=dtype, requires_grad=True)
    w_in, w_out = torch.randn(5, 24, 16, requires_grad=True), torch.randn(5, 16, 12, requires_grad=True)
    b_in = torch.randn(5, 24, requires_grad=True) if biased else None
    expert, gate = choose(kind, 33, 2, 5), torch.rand(33, 2, requires_grad=True)
    inputs = [tensor for tensor in (x, w_in, w_out, gate, b_in) if tensor is not None]
    given = (x, w_in, w_out, expert, gate, "swiglu", b_in)
    equal(compiled.expert_ffn(*given), experts_cpu.expert_ffn(*given), inputs)
    torch.library.opcheck(
        compiled._experts,
        (x, w_in, w_out, gate, b_in, expert, "swiglu"),
        test_utils=("test_schema", "test_autograd_registration"),  # what lies in rows that nobody wrote is compared by the others
    )


@pytest.mark.parametrize("sight", [Sight(), Sight(window=5), Sight(chunk=4), Sight(document_BP=torch.arange(22).view(2, 11) // 4)])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention(sight, sinks):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 11, 8, requires_grad=True) for heads in (4, 2, 2))
    sink = torch.randn(4, requires_grad=True) if sinks else None
    inputs = [tensor for tensor in (q, k, v, sink) if tensor is not None]
    equal(compiled.attend_masked(q, k, v, sight, sink), attention_masked.attend(q, k, v, sight, sink), inputs)
    rows = [tensor.detach().flatten(0, 1).requires_grad_() for tensor in (k, v)]
    limits = [sight.start, *(-1 if limit is None else limit for limit in (sight.window, sight.chunk))]
    torch.library.opcheck(compiled._masked, (q.detach().view(4, 2, 11, 8).requires_grad_(), *rows, sink, sight.document_BP, limits, 0.3))


def test_expert_linear():
    torch.manual_seed(0)
    x, w, expert = torch.randn(9, 6, requires_grad=True), torch.randn(4, 5, 6, requires_grad=True), torch.tensor([0, 3, 3, 1, 0, 0, 3, 1, 0])
    ours, theirs = compiled.expert_linear(x, w, expert), expert_linear.expert_linear(x, w, expert)
    slope = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, w), slope), torch.autograd.grad(theirs, (x, w), slope))
    torch.library.opcheck(compiled.expert_linear, (x, w, expert))
