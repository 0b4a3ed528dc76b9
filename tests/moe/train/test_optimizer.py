"""Our AdamW against torch's, and which parameters it decays."""

from __future__ import annotations

import pytest
import torch

from moe.model import build_model
from moe.train.optimizer import AdamW
from spec.model import Model
from spec.training import Optimizer
from tests.moe.train.tiny import tiny

SPEC = tiny(model={"tie_embeddings": False, "norm": "layernorm", "norm_bias": True}).model


def test_makes_the_steps_of_torch_s_own() -> None:
    settings = Optimizer(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, router_lr_factor=5, grad_clip=0.5)
    torch.manual_seed(1)
    model, twin = build_model(SPEC), build_model(SPEC)
    twin.load_state_dict(model.state_dict())
    ours = AdamW(model, settings)
    parameters = dict(twin.named_parameters())
    theirs = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay, "factor": group.rate_factor}
            for group in ours.groups.values()
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
        fused=True,
    )
    for rate in (0.01, 0.02, 0.005):
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for group in theirs.param_groups:
            group["lr"] = rate * group["factor"]
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        assert torch.equal(ours.clip(0.5), norm)
        ours.step(rate)
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_decays_matrices_but_not_norms_biases_and_embeddings() -> None:
    optimizer = AdamW(build_model(SPEC), Optimizer(router_lr_factor=7))
    groups = optimizer.groups
    assert sorted(name for group in groups.values() for name in group.names) == sorted(optimizer.parameters)
    assert {name for name in optimizer.parameters if "norm" in name or name.startswith("embedding")} <= set(groups["plain"].names)
    assert all(".router." in name for name in groups["router"].names)
    assert len(groups["router"].names) == 2
    assert "head" in groups["matrix"].names
    assert (groups["plain"].weight_decay, groups["matrix"].weight_decay, groups["router"].rate_factor) == (0, 0.1, 7)


def test_a_clip_of_zero_leaves_the_gradients() -> None:
    optimizer = AdamW(build_model(SPEC), Optimizer())
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, 3.0)
    count = sum(parameter.numel() for parameter in optimizer.parameters.values())
    assert float(optimizer.clip(0)) == pytest.approx(3 * count**0.5)
    assert all(bool((parameter.grad == 3).all()) for parameter in optimizer.parameters.values() if parameter.grad is not None)


def test_biases_of_attention_experts_are_not_decayed_and_their_routers_are_routers() -> None:
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "bias": True, "output_bias": True, "sinks": True, "experts": {}}
    groups = AdamW(build_model(Model.model_validate({"d_model": 16, "n_layers": 1, "attention": attention})), Optimizer()).groups
    at = "blocks.0.attention."
    assert {at + name for name in ("q_bias", "out_bias", "kv.bias", "sinks_H")} <= set(groups["plain"].names)
    assert {at + name for name in ("w_q", "w_out", "kv.weight")} <= set(groups["matrix"].names)
    assert at + "router" in groups["router"].names
