"""Scaled rotary positions against transformers' frequencies and against the papers' definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe.rope import Rope, attention_scale, scaled
from spec.attention import LongRopeScaling
from spec.model import Model

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

SHORT, LONG = [1.0 + 0.1 * i for i in range(16)], [1.0 + i for i in range(16)]
# Ours, theirs, and the number of positions that there are.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "linear": ({"factor": 4}, {"factor": 4.0}, 10),
    "llama3": (
        {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "trained_len": 64},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        10,
    ),
    "yarn": ({"factor": 32, "trained_len": 256}, {"factor": 32.0, "original_max_position_embeddings": 256}, 10),
    "yarn, gpt-oss": (
        {"factor": 32, "trained_len": 4096, "truncate": False},
        {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
        10,
    ),
    "yarn, deepseek": (
        {"factor": 40, "mscale": 0.707, "mscale_all_dim": 1.3, "trained_len": 512},
        {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3, "original_max_position_embeddings": 512},
        10,
    ),
    "longrope, short": (
        {"short_factor": SHORT, "long_factor": LONG, "trained_len": 64, "max_len": 512},
        {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64},
        64,
    ),
    "longrope, long": (
        {"short_factor": SHORT, "long_factor": LONG, "trained_len": 64, "max_len": 512},
        {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64},
        65,
    ),
}


def model(scaling: dict[str, Any] | None, **changes: Any) -> Model:
    plain: dict[str, Any] = {"d_model": 64, "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2}, "moe": None, "rope_scaling": scaling}
    return Model.model_validate(plain | changes)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factor_are_transformers(name: str) -> None:
    ours, theirs, positions = CASES[name]
    kind = name.split(",")[0]
    spec = model({"kind": kind, **ours})
    longest = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **theirs}}
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, **longest)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=positions)
    assert spec.rope_scaling is not None
    plain = 5000.0 ** (-torch.arange(0, 32, 2) / 32)
    got, factor = scaled(plain, spec.rope_scaling, 5000.0, positions)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    assert factor == pytest.approx(wanted_factor, rel=1e-6)
    assert not torch.allclose(got, plain, rtol=1e-3)


def test_a_turn_is_angle_and_factor() -> None:
    spec = model({"kind": "yarn", "factor": 4, "trained_len": 32})
    rope = Rope(5, 8, 100.0, torch.device("cpu"), start=7, scaling=spec.rope_scaling)
    inverse, factor = scaled(100.0 ** (-torch.arange(0, 8, 2) / 8), spec.rope_scaling, 100.0, 12)  # type: ignore[arg-type]
    x = torch.randn(1, 5, 1, 8, dtype=torch.float64)
    y = rope.rotate(x)
    for position in range(5):
        for pair in range(4):
            angle, (a, b) = (7 + position) * float(inverse[pair]), x[0, position, 0, 2 * pair : 2 * pair + 2].tolist()
            wanted = [factor * (a * math.cos(angle) - b * math.sin(angle)), factor * (a * math.sin(angle) + b * math.cos(angle))]
            assert y[0, position, 0, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_a_lone_vector_at_an_odd_place_has_a_gradient() -> None:
    """As in latent attention over one position, whose heads begin with an odd number of dimensions without position."""
    rope = Rope(1, 2, 100.0, torch.device("cpu"), start=0)
    x = torch.randn(1, 1, 1, 2, requires_grad=True)
    whole = torch.cat((torch.zeros(1, 1, 1, 1), rope.rotate(x)), -1)
    whole.backward(torch.tensor([5.0, 2.0, 3.0]).view_as(whole))  # the first position turns by nothing
    assert x.grad is not None and x.grad.flatten().tolist() == [2.0, 3.0]


def test_given_factors_of_longrope_replace_the_formula() -> None:
    scaling = LongRopeScaling(short_factor=[1.0], long_factor=[2.0], short_mscale=1.1, long_mscale=1.3, trained_len=16, max_len=64)
    assert [scaled(torch.ones(1), scaling, 10.0, most)[1] for most in (16, 17)] == [1.1, 1.3]


def test_deepseeks_scale_of_the_scores() -> None:
    """mscale^2 / sqrt(width) with mscale = 0.1 mscale_all_dim ln(factor) + 1."""
    scale = attention_scale(model({"kind": "yarn", "factor": 40, "mscale": 1, "mscale_all_dim": 0.5}), 64)
    assert scale == pytest.approx((0.05 * math.log(40) + 1) ** 2 / 8)
    assert attention_scale(model({"kind": "yarn", "factor": 40}), 64) is None
    assert attention_scale(model(None), 64) is None


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ({"kind": "llama3", "low_freq_factor": 4, "high_freq_factor": 3}, "high_freq_factor 3.0 must be >= low_freq_factor 4.0"),
        ({"kind": "yarn", "beta_fast": 1, "beta_slow": 2}, "beta_fast 1.0 must be > beta_slow 2.0"),
        ({"kind": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 15}, "long_factor has 15 numbers, short_factor 16"),
        ({"kind": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}, "has 8 numbers; 32 rotated dimensions need 16"),
        ({"kind": "longrope", "short_factor": [0.0] * 16, "long_factor": [1.0] * 16}, "short_factor must be positive"),
    ],
)
def test_bad_scalings_are_refused(scaling: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        model(scaling)
