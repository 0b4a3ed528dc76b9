"""Attention, normalisation and the sorting plan of the CPU path, against torch and obvious loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention_cpu, rms_norm_cpu
from kernels.plan import make_plan


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 15, 16, 37])
def test_attention_equals_torch(heads, length, monkeypatch):
    monkeypatch.setattr(attention_cpu, "BLOCK", 16)
    monkeypatch.setattr(attention_cpu, "SCORE_BYTES", 8000)
    torch.manual_seed(0)
    q, k = (torch.randn(2, n, length, 8, dtype=torch.float64, requires_grad=True) for n in heads)
    v = torch.randn(2, heads[1], length, 6, dtype=torch.float64, requires_grad=True)
    got = attention_cpu.attend(q, k, v)
    share = heads[0] // heads[1]
    score = q @ k.repeat_interleave(share, 1).transpose(2, 3) / 8**0.5
    score = score.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    wanted = score.softmax(-1) @ v.repeat_interleave(share, 1)
    dy = torch.randn_like(got)
    for a, b in zip((got, *torch.autograd.grad(got, (q, k, v), dy)), (wanted, *torch.autograd.grad(wanted, (q, k, v), dy)), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_in_bfloat16_stays_near_float64():
    torch.manual_seed(1)
    exact = [torch.randn(2, 4, 150, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    near = [t.detach().bfloat16().requires_grad_() for t in exact]
    dy = torch.randn(2, 4, 150, 16, dtype=torch.float64)
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True)
    got = attention_cpu.attend(*near)
    pairs = zip((got, *torch.autograd.grad(got, near, dy.bfloat16())), (wanted, *torch.autograd.grad(wanted, exact, dy)), strict=True)
    assert all((a.double() - b).norm() / b.norm() < 1e-2 for a, b in pairs)


@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 7), (2, 3, 4, 9)])
def test_rms_norm_equals_torch(shape):
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    got, wanted = rms_norm_cpu.rms_norm(x, weight, 1e-3, torch.float64), F.rms_norm(x, shape[-1:], weight, 1e-3)
    dy = torch.randn(shape, dtype=torch.float64)
    for a, b in zip((got, *torch.autograd.grad(got, (x, weight), dy)), (wanted, *torch.autograd.grad(wanted, (x, weight), dy)), strict=True):
        torch.testing.assert_close(a, b)


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm_cpu.rms_norm(x, torch.ones(8), 1e-5, torch.float32)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, torch.zeros(2, 8)) and gradient.isfinite().all()


@given(data=st.data(), n_experts=st.integers(1, 6), n_tokens=st.integers(1, 20), top_k=st.integers(1, 3), multiple=st.sampled_from([1, 4, 32]))
@settings(max_examples=60, deadline=None)
def test_a_plan_puts_every_kept_assignment_into_its_experts_rows_once(data, n_experts, n_tokens, top_k, multiple):
    choice = st.lists(st.integers(0, n_experts), min_size=top_k, max_size=top_k)
    expert = torch.tensor(data.draw(st.lists(choice, min_size=n_tokens, max_size=n_tokens)))
    plan = make_plan(expert, n_experts, multiple)
    assert all(size % multiple == 0 for size in plan.size_E) and sum(plan.size_E) == plan.n_rows
    seen = set()
    for token in range(n_tokens):
        for k in range(top_k):
            e, row = int(expert[token, k]), int(plan.row_TK[token, k])
            if e == n_experts:
                assert row == plan.n_rows
                continue
            assert sum(plan.size_E[:e]) <= row < sum(plan.size_E[: e + 1]) and int(plan.token_R[row]) == token
            seen.add(row)
    assert len(seen) == int((expert < n_experts).sum()) == len(plan.slot_N)
