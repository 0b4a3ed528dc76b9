"""The accountant's FLOPs against those of the matrix products that torch makes, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch, experts_naive
from moe.model import build_model
from spec.accounting import price
from spec.accounting.attention import attention_flops, mtp_attention_flops
from spec.experiment import ExperimentSpec
from spec.peak import PEAKS, peak_flop_per_s
from tests.moe.train.tiny import tiny

B, S = 2, 12
MOE = {"n_experts": 6, "top_k": 2, "d_expert": 24}
LATENT = {"kind": "mla", "n_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"moe": MOE},
    "dense": {"moe": None, "tie_embeddings": False},
    "deepseek": {
        "attention": LATENT,
        "moe": MOE | {"n_shared": 2, "first_k_dense": 1, "combine": "sigmoid_gate", "router": {"kind": "sigmoid_topk"}},
    },
    "predicting ahead": {"mtp_depth": 1, "moe": MOE},
    "ungated, scored by an mlp": {"moe": MOE | {"activation": "gelu", "router": {"kind": "softmax_topk", "scorer": "mlp", "scorer_dim": 10}}},
}


def all_pairs(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSV: Tensor) -> Tensor:
    """Attention in plain products, which torch counts: of every query with every key, so twice what is seen, but for the diagonal."""
    k, v = (x.repeat_interleave(q_BHSC.shape[1] // x.shape[1], 1) for x in (k_BGSC, v_BGSV))
    seen = torch.ones(q_BHSC.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q_BHSC @ k.transpose(2, 3)).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def priced(spec: ExperimentSpec) -> int:
    """The accountant's, with attention to all S positions in the place of (S + 1) / 2 on average; with an extra prediction S is one less there."""
    attention, ahead = attention_flops(spec.model, S), mtp_attention_flops(spec.model, S)
    return price(spec).flops_per_token.training + 3 * (attention + ahead) * (S - 1) // (S + 1)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_priced_is_what_torch_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny(model=MODELS[name], data={"seq_len": S})
    monkeypatch.setattr(dispatch, "attend", all_pairs)
    monkeypatch.setattr(dispatch, "expert_ffn", lambda *arguments: experts_naive.expert_ffn(*arguments[:7]))
    torch.manual_seed(0)
    model = build_model(spec.model)
    tokens_BS = torch.randint(0, spec.model.vocab_size, (B, S))
    with FlopCounterMode(display=False) as counter:
        output = model(tokens_BS, tokens_BS)
        losses = [loss for loss in (output.lm_loss, output.balance_loss, output.mtp_loss) if loss is not None]
        torch.stack(losses).sum().backward()
    if spec.model.mtp_depth:  # the extra block has one position less
        assert counter.get_total_flops() < B * S * priced(spec) < 1.1 * counter.get_total_flops()
    else:
        assert counter.get_total_flops() == B * S * priced(spec)


def test_the_peak_is_that_of_the_device_and_the_precision() -> None:
    assert peak_flop_per_s("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flop_per_s("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flop_per_s("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flop_per_s("NVIDIA A10", "float32") == 31.2e12
    assert peak_flop_per_s("NVIDIA GeForce RTX 4090", "bfloat16") == 165.2e12
    assert peak_flop_per_s("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(494e12 / 3), "three tf32 products for one"
    assert peak_flop_per_s("NVIDIA L40S", "float32") == 91.6e12, "the plain cores"
    for other in (
        "cpu",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI300X",
        "NVIDIA GeForce RTX 3090 Ti",
    ):
        assert peak_flop_per_s(other, "bfloat16") is None


@pytest.mark.parametrize("name", PEAKS)
def test_no_way_to_multiply_in_float32_is_faster_than_its_peak(name: tuple[str, ...]) -> None:
    """A run's seconds are those of its plain products and of its tf32x3 ones; whatever their shares, it stays below the peak."""
    peak = PEAKS[name]
    for share in (0.0, 0.3, 1.0):
        seconds = share / (peak.tf32 / 3) + (1 - share) / peak.plain
        assert 1 / seconds <= peak.float32 * (1 + 1e-12)
    assert peak.plain <= peak.float32 <= peak.tf32 <= peak.bfloat16
