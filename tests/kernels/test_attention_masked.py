"""Attention within sight against a loop over queries and keys in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention_masked, dispatch
from kernels.attention_masked import Sight, attend


def loop(q: Tensor, k: Tensor, v: Tensor, sight: Sight, sinks: Tensor | None = None, scale: float | None = None) -> Tensor:
    """One query of one head at a time, each key judged by the rules as they are said."""
    batch, heads, queries, width = q.shape
    keys, sharing = k.shape[2], heads // k.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                at = sight.start + i
                weights, total = [], 0.0 if sinks is None else math.exp(float(sinks[h]))
                for j in range(keys):
                    place = sight.start + queries - keys + j
                    seen = place <= at
                    seen = seen and (sight.window is None or at - place < sight.window)
                    seen = seen and (sight.chunk is None or at // sight.chunk == place // sight.chunk)
                    if sight.document_BP is not None:
                        seen = seen and bool(sight.document_BP[b, j] == sight.document_BP[b, keys - queries + i])
                    weights.append(math.exp(scale * float(q[b, h, i].double() @ k[b, h // sharing, j].double())) if seen else 0.0)
                total += sum(weights)
                for j, weight in enumerate(weights):
                    out[b, h, i] += weight / total * v[b, h // sharing, j].double()
    return out


def tensors(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 6, value: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], Sight, Tensor | None, float | None, int, int]:
    batch, kv_heads, sharing = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, past = draw(st.integers(1, 11)), draw(st.integers(0, 9))
    window, chunk = draw(st.none() | st.integers(1, 12)), draw(st.none() | st.integers(1, 12))
    held = draw(st.integers(past - Sight(window=window, chunk=chunk).lowest(past) if past else 0, past))  # what a cache may have let go of
    document = None
    if draw(st.booleans()):
        steps = draw(st.lists(st.lists(st.booleans(), min_size=held + queries, max_size=held + queries), min_size=batch, max_size=batch))
        document = torch.tensor(steps).cumsum(1)
    sinks = torch.tensor(draw(st.lists(st.floats(-3, 3), min_size=kv_heads * sharing, max_size=kv_heads * sharing))).double()
    parts = tensors(batch, kv_heads * sharing, kv_heads, queries, held + queries, seed=draw(st.integers(0, 999)))
    sight = Sight(past, window, chunk, document)
    return parts, sight, draw(st.sampled_from([None, sinks])), draw(st.sampled_from([None, 0.7])), draw(st.integers(1, 5)), draw(st.integers(1, 900))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_as_a_loop_over_pairs(case: tuple[tuple[Tensor, ...], Sight, Tensor | None, float | None, int, int]) -> None:
    parts, sight, sinks, scale, block, score_bytes = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_masked, "BLOCK", block)
        patch.setattr(attention_masked, "SCORE_BYTES", {"cpu": score_bytes})
        got = attend(*parts, sight, sinks, scale)
    torch.testing.assert_close(got, loop(*parts, sight, sinks, scale), rtol=1e-9, atol=1e-9)


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 7]])
SIGHTS = {
    "causal": Sight(),
    "window": Sight(window=3),
    "chunk": Sight(chunk=3),
    "documents": Sight(document_BP=DOCUMENTS),
    "all": Sight(window=4, chunk=5, document_BP=DOCUMENTS),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", SIGHTS)
def test_gradients(name: str, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masked, "BLOCK", 3)
    q, k, v = (part.requires_grad_() for part in tensors(2, 4, 2, 7, 7, 3, 2))
    if sinks:
        sink = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *parts: attend(*parts[:3], SIGHTS[name], parts[3]), (q, k, v, sink))
    else:
        assert torch.autograd.gradcheck(lambda *parts: attend(*parts, SIGHTS[name], None, 0.9), (q, k, v))


def test_gradients_with_a_past() -> None:
    q, k, v = (part.requires_grad_() for part in tensors(1, 2, 1, 3, 7, 3, 2))
    assert torch.autograd.gradcheck(lambda *parts: attend(*parts, Sight(start=6, window=5)), (q, k, v))


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_without_limits_it_is_causal_attention(length: int) -> None:
    q, k, v = (part.float().requires_grad_() for part in tensors(2, 4, 2, length, length, 16, 8))
    weight = torch.randn(2, 4, length, 8)
    wanted = torch.autograd.grad((dispatch.attend(q, k, v) * weight).sum(), (q, k, v))
    got = torch.autograd.grad((dispatch.attend_masked(q, k, v, Sight()) * weight).sum(), (q, k, v))
    torch.testing.assert_close(dispatch.attend_masked(q, k, v, Sight()), dispatch.attend(q, k, v), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_float64() -> None:
    q, k, v = tensors(2, 4, 2, 200, 200, 16, 8)
    sinks, sight = torch.tensor([0.0, 1.0, -1.0, 3.0]), Sight(window=50)
    rough = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), sight, sinks)
    exact = attend(*(part.bfloat16().double() for part in (q, k, v)), sight, sinks.double())
    assert rough.dtype == torch.bfloat16
    assert (rough.double() - exact).norm() < 0.005 * exact.norm()


def test_keys_out_of_sight_are_not_read() -> None:
    """NaN in a key or value that no query sees changes nothing, forward or backward: blocks leave it out."""
    q, k, v = (part.float().requires_grad_() for part in tensors(1, 2, 1, 2, 140, 8, 8))
    sight = Sight(start=138, window=4)
    poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
    poisoned_k[:, :, :135], poisoned_v[:, :, :135] = math.nan, math.nan
    clean, poisoned = attend(q, k, v, sight), attend(q, poisoned_k, poisoned_v, sight)
    assert torch.equal(clean, poisoned)
    assert torch.autograd.grad(poisoned.sum(), q)[0].isfinite().all()


def test_a_window_costs_its_width() -> None:
    """Pieces of work together hold about length x (window + block) scores, not length x length."""
    length, window = 2048, 64
    q, k = torch.zeros(1, 1, length, 4), torch.zeros(1, length, 4)
    scores = sum(
        (work.queries.stop - work.queries.start) * (work.keys.stop - work.keys.start) for work in attention_masked._pieces(q, k, Sight(window=window))
    )
    assert scores <= length * (window + attention_masked.BLOCK)
