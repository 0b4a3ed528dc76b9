"""The Triton kernels in Triton's interpreter against their plain-torch twins. Memory that a kernel may not read holds NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from kernels import blocks, experts_naive, experts_triton, grouped_gemm_naive
from kernels import descriptor as descriptors
from kernels.activation import GATED
from kernels.combine_triton import combine
from kernels.descriptor import ROUNDS, descriptor, weight_descriptor
from kernels.experts_backward_triton import row_sum, weight_gradient
from kernels.grouped_gemm_triton import grouped_gemm, make_tiles
from kernels.tf32_triton import rounded
from tests.kernels.routing import KINDS, choose

SMALL = blocks.SMALL.up
SHAPES = [(37, 3, 6, 20, 24), (1, 1, 4, 16, 16), (16, 2, 3, 33, 17)]  # T, K, E, A, B; no descriptor takes the rows of the last


@pytest.fixture(autouse=True)
def _bfloat16_dots(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bfloat16 operands (triton-lang/triton, issue 11584): widen them first."""
    plain = interpreter.InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory holds NaN, so that reading what was never written shows."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gather", "activation"), [(True, "swiglu"), (True, "none"), (False, "none"), (True, "gelu")])
def test_grouped_gemm_equals_its_twin(kind, shape, gather, activation):
    n_tokens, top_k, n_experts, n_inner, n_outer = shape
    expert = choose(kind, n_tokens, top_k, n_experts)
    tiles = make_tiles(expert, n_experts, SMALL.rows)
    a = torch.randn(n_tokens if gather else n_tokens * top_k, n_inner)
    kept = int((expert < n_experts).sum())
    if not gather:
        a[kept:] = float("nan")
    w = torch.randn(n_experts, 2 * n_outer if activation in GATED else n_outer, n_inner)
    bias = torch.randn(w.shape[:2]) if activation in GATED else None
    got, looped = (
        grouped_gemm(a, w, tiles, gather=gather, activation=activation, bias_EB=bias, blocks=replace(SMALL, persistent=persistent))
        for persistent in (False, True)
    )
    assert torch.equal(got[:kept], looped[:kept]) and looped[kept:].isnan().all()
    wanted = grouped_gemm_naive.grouped_gemm(a, w, tiles.token_R, tiles.end_E.tolist(), gather=gather, activation=activation, bias_EB=bias)
    torch.testing.assert_close(got[:kept], wanted[:kept], rtol=1e-4, atol=1e-4)
    assert got[kept:].isnan().all()  # nothing was written there


@pytest.mark.parametrize("width", [18, 20, 48])
def test_grouped_gemm_takes_any_strides(width):
    """Weights that lie the other way, by pointers, by descriptors that reach beyond an expert's matrix, and in whole tiles."""
    expert = choose("spread", 20, 2, 4)
    tiles = make_tiles(expert, 4, SMALL.rows)
    a, w = torch.randn(24, 20).t(), torch.randn(4, 24, width).transpose(1, 2)
    assert (weight_descriptor(w, 16, 16) is None) == (width == 18)
    got = grouped_gemm(a, w, tiles, gather=True, blocks=SMALL)
    wanted = grouped_gemm_naive.grouped_gemm(a, w, tiles.token_R, tiles.end_E.tolist(), gather=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_descriptor_is_made_only_of_what_it_can_take():
    whole = torch.randn(4, 8, 12)
    assert descriptor(whole, [1, 16, 16]) is not None
    assert descriptor(whole[:, :, 4:], [1, 16, 16]) is not None  # starts at 16 bytes, rows of 48
    rows_of_40_bytes, rows_of_24_bytes, repeated = torch.randn(4, 8, 10), whole.bfloat16(), whole[:1].expand(4, 8, 12)
    for refused in (whole[:, :, 1:], whole.transpose(1, 2), rows_of_40_bytes, rows_of_24_bytes, whole[:0], repeated):
        assert descriptor(refused, [1, 16, 16]) is None
    exact = [descriptor(whole, [1, 16, 16], precision=precision) for precision in ("tf32x3", None)]
    for_tf32 = descriptor(whole, [1, 16, 16], precision="tf32")
    if ROUNDS:
        assert [of.round_f32_to_tf32 for of in (*exact, for_tf32)] == [False, False, True]
    else:
        assert for_tf32 is None and None not in exact  # by pointers, which are rounded


def test_without_a_descriptor_that_rounds_tf32_goes_by_pointers(monkeypatch):
    monkeypatch.setattr(descriptors, "ROUNDS", False)
    assert descriptor(torch.randn(4, 8, 12), [1, 16, 16], precision="tf32") is None
    assert descriptor(torch.randn(4, 8, 12).bfloat16()[:, :, :8].contiguous(), [1, 16, 16], precision="tf32") is not None


def test_tf32_is_the_nearest():
    """Ten bits of fraction, ties away from zero, as the copy engine does it; NaN, of which any bits may be set, and infinities stay."""
    x = torch.cat([torch.randn(3000) * 10.0 ** torch.randint(-30, 30, (3000,)), torch.tensor([1 + 2**-11, -1 - 2**-11, 0.0, float("inf")])])
    mantissa, exponent = np.frexp(x.double().numpy())
    nearest = np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 2**11 + 0.5), exponent - 11)
    np.testing.assert_array_equal(rounded(x, "tf32").double().numpy(), nearest)
    assert rounded(torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32), "tf32").isnan().all()
    assert rounded(x, "tf32x3") is x
    assert rounded(x.bfloat16(), "tf32").dtype == torch.bfloat16


def test_float32_is_multiplied_as_torch_was_told():
    usual = torch.get_float32_matmul_precision()
    try:
        for told, wanted in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(told)
            assert experts_triton._precision(torch.float32) == wanted
            assert experts_triton._precision(torch.bfloat16) == "tf32"
    finally:
        torch.set_float32_matmul_precision(usual)


@pytest.mark.parametrize("gather", ["left", "right"])
@pytest.mark.parametrize(("n_left", "n_right"), [(20, 24), (32, 16), (17, 33)])
def test_weight_gradients_stay_within_their_experts_rows(gather, n_left, n_right):
    """Sixteen rows are added at a time: what the next expert has, or nobody wrote, may not come in, be it NaN."""
    expert = torch.tensor([0] * 35 + [2] * 32 + [3] * 3 + [4] * 7)[torch.randperm(77)][:, None]
    tiles = make_tiles(expert, 4, SMALL.rows)
    by_token, by_row = torch.randn(77, n_left if gather == "left" else n_right), torch.randn(77, n_right if gather == "left" else n_left)
    by_row[70:] = float("nan")  # rows of the dropped
    by_row[35:67] = float("nan")  # expert 2
    left, right = (by_token, by_row) if gather == "left" else (by_row, by_token)
    got = weight_gradient(left, right, tiles, gather=gather, dtype=torch.float32, blocks=SMALL)
    token = tiles.token_R.long()
    for e, (start, end) in enumerate(((0, 35), (35, 35), (35, 67), (67, 70))):
        a = left[token[start:end]] if gather == "left" else left[start:end]
        b = right[token[start:end]] if gather == "right" else right[start:end]
        if e == 2:
            assert got[e].isnan().all()
        else:
            torch.testing.assert_close(got[e], a.T @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_row_sum_adds_each_experts_rows(kind):
    expert = choose(kind, 50, 2, 5)
    tiles = make_tiles(expert, 5, SMALL.rows)
    rows = torch.randn(100, 130)
    rows[int(tiles.end_E[-1]) :] = float("nan")
    wanted = torch.stack([rows[tiles.slot_R.long().argsort()][(expert == e).flatten()].sum(0) for e in range(5)])
    torch.testing.assert_close(row_sum(rows, tiles, torch.float32), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_cover_each_experts_rows_once(kind):
    expert = choose(kind, 50, 2, 5)
    tiles = make_tiles(expert, 5, 16)
    covered, start = [], 0
    for e, end in enumerate(tiles.end_E.tolist()):
        starts = tiles.start_M[tiles.expert_M == e].tolist()
        assert starts == list(range(start, end, 16))
        covered += starts
        start = end
    assert len(covered) == int((tiles.expert_M < 5).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 16, 1500])
def test_combine_sums_the_kept_rows(kind, width):
    expert = choose(kind, 19, 3, 4)
    tiles = make_tiles(expert, 4, 16)
    y, gate = torch.randn(57, width), torch.rand(19, 3)
    kept = int((expert < 4).sum())
    y[kept:] = float("nan")
    got = combine(y, tiles.row_TK, gate, tiles.end_E[-1:])
    wanted = torch.zeros(19, width)
    for t in range(19):
        for k in range(3):
            if expert[t, k] < 4:
                wanted[t] += gate[t, k] * y[tiles.row_TK[t, k]]
    torch.testing.assert_close(got, wanted)


def layer(activation: str, dtype: torch.dtype, kind: str, n_tokens: int = 33, width: int = 20, *, biased: bool = False) -> tuple[Any, ...]:
    """Inputs of `expert_ffn` that want gradients; x and the products in `dtype`. Of width 20 or 23 no descriptor takes 2-byte rows."""
    x = torch.randn(n_tokens, width).to(dtype).requires_grad_()
    n_hidden = width if width % 8 == 0 else 23
    rows = 2 * n_hidden if activation in GATED else n_hidden
    w_in = torch.randn(5, rows, width).mul_(0.4).to(dtype).requires_grad_()
    w_out = torch.randn(5, width, n_hidden).mul_(0.4).to(dtype).requires_grad_()
    b_in = torch.randn(5, rows).requires_grad_() if biased else None
    return x, w_in, w_out, choose(kind, n_tokens, 2, 5), torch.rand(n_tokens, 2).requires_grad_(), activation, b_in


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("activation", "dtype", "most", "width", "biased"),
    [
        ("swiglu", torch.float32, 1e-5, 32, False),  # descriptors, whole tiles
        ("swiglu", torch.bfloat16, 2e-2, 16, False),
        ("swiglu_clamped", torch.float16, 2e-3, 24, True),
        ("swiglu_clamped", torch.float32, 1e-5, 20, True),
        ("gelu", torch.float32, 1e-5, 24, True),
        ("geglu", torch.float32, 1e-5, 20, False),
        ("relu", torch.float32, 1e-5, 20, False),
    ],
)
def test_output_and_gradients_equal_the_loop(kind, activation, dtype, most, width, biased):
    """The interpreter truncates where it casts to bfloat16, which a device rounds: hence twice the error that `make gpu` allows."""
    x, w_in, w_out, expert, gate, _, b_in = given = layer(activation, dtype, kind, width=width, biased=biased)
    inputs = [x, w_in, w_out, gate, *([b_in] if biased else [])]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got = experts_triton.expert_ffn(*given)
    wanted = experts_naive.expert_ffn(*exact[:3], expert, exact[3], activation, *exact[4:])
    slope = torch.randn(got.shape).to(dtype)
    gradients = torch.autograd.grad(got, inputs, slope)
    names = ("y", "dx", "dw_in", "dw_out", "dgate", "db_in")
    for name, a, b in zip(names, (got, *gradients), (wanted, *torch.autograd.grad(wanted, exact, slope.double())), strict=False):
        assert (a.double() - b).norm() <= most * b.norm().clamp_min(1e-6), name


def test_gradients_of_biases_repeat_to_the_bit_and_have_the_biases_dtype():
    given = layer("swiglu_clamped", torch.bfloat16, "spread", biased=True)
    first, second = (torch.autograd.grad(experts_triton.expert_ffn(*given).sum(), given[6])[0] for _ in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, second)


@pytest.mark.parametrize("kind", ["dropped", "all dropped"])
def test_memory_for_the_kept_is_enough(kind):
    """With room for just the kept assignments the layer is the same, forward and backward."""
    x, w_in, w_out, expert, gate, activation, _ = layer("swiglu", torch.float32, kind)
    kept = max(1, int((expert < 5).sum()))
    results = []
    for most_rows in (None, kept):
        y = experts_triton.expert_ffn(x, w_in, w_out, expert, gate, activation, most_rows=most_rows)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w_in, w_out, gate))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][4][expert == 5].any()
    _, h = experts_triton._expert_ffn(x, w_in, w_out, expert, gate, None, activation, kept, True)
    assert len(h) == kept


def test_no_token_at_all():
    """A rank that is sent nothing."""
    x, w_in, w_out, expert, gate, *_ = layer("swiglu", torch.float32, "spread", n_tokens=0)
    y = experts_triton.expert_ffn(x, w_in, w_out, expert, gate, "swiglu")
    gradients = torch.autograd.grad(y.sum(), (x, w_in, w_out, gate))
    assert y.shape == (0, 20) and not gradients[1].any() and not gradients[2].any()


def test_the_operation_is_registered_as_torch_asks():
    x, w_in, w_out, expert, gate, activation, b_in = layer("swiglu", torch.float32, "dropped", biased=True)
    given = (x, w_in, w_out, expert, gate, b_in, activation, 66, True)
    torch.library.opcheck(experts_triton._expert_ffn, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_only_input_and_hidden_layer_are_kept():
    """2 T D + 4 T K F bytes in bfloat16, beside the weights and the routing."""
    x, w_in, w_out, expert, gate, *_ = given = layer("swiglu", torch.bfloat16, "spread", 64)
    kept: list[int] = []
    beside = {t.untyped_storage().data_ptr() for t in (w_in, w_out, expert, gate)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in beside:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts_triton.expert_ffn(*given)
    assert sum(kept) == 2 * 64 * 20 + 4 * 64 * 2 * 23


def test_evaluation_keeps_nothing():
    with torch.no_grad():
        x, w_in, w_out, expert, gate, activation, _ = layer("swiglu", torch.float32, "dropped")
        _, h = experts_triton._expert_ffn(x, w_in, w_out, expert, gate, None, activation, 66, False)
    assert h.shape == (0, 46)
