"""Experts placed by load, hot ones on several ranks, give the whole model's outputs, and even loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.model import Transformer, build_model
from moe.parallel import Mesh, Slots
from moe.placed import place_experts
from spec.model import Model
from spec.placement import place, plain
from tests.moe.parallel.ranks import on_ranks

E, K, TOKENS = 8, 2, 64
SPEC = Model.model_validate(
    {
        "n_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "vocab_size": 40,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1},
        "moe": {"n_experts": E, "top_k": K, "d_expert": 8, "n_shared": 1, "bias": "expert", "router": {"init_std": 1.0}},
    }
)


def whole_model() -> Transformer:
    torch.manual_seed(0)
    model = build_model(SPEC).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.normal_(0, 0.5)
    return model


def on_each(ranks: int) -> dict[str, Any]:
    """One rank's logits, whole and placed, and what each layer sends to each rank under the plain and the better placement."""
    mesh, model = Mesh.of(1, ranks), whole_model()
    torch.manual_seed(mesh.rank)
    tokens = torch.randint(0, 40, (2, TOKENS // 2))
    wanted = model(tokens)
    load = wanted.stats.expert_tokens_LE.clone()
    dist.all_reduce(load)
    got: dict[str, Any] = {"differences": {}, "arrived": {}}
    for name, placement in (
        ("plain", plain(2, E, ranks)),
        ("by load", place(load.numpy(), 2 * E, 1, 1, ranks)),
    ):
        placed = whole_model()
        place_experts(placed, mesh, placement.expert_LS.tolist())
        output = placed(tokens)
        arrived = output.stats.sent_LP.clone()
        dist.all_reduce(arrived)
        got["differences"][name] = (output.logits_BSV - wanted.logits_BSV).abs().max().item() / wanted.logits_BSV.abs().max().item()
        got["arrived"][name] = arrived.tolist()
        got["counts"] = [output.stats.expert_tokens_LE.tolist(), wanted.stats.expert_tokens_LE.tolist()]
        got["expected"] = placement.device_load(load.numpy()).tolist()
    with pytest.raises(ValueError, match="evaluation mode"):
        placed.train()(tokens)
    return got


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_placed_experts_are_the_experts_of_one_process(tmp_path: Path, ranks: int) -> None:
    got = on_ranks(ranks, tmp_path, on_each, ranks)
    for one in got:
        assert max(one["differences"].values()) < 1e-12
        assert one["counts"][0] == one["counts"][1], "what the router chose is told by expert, not by copy"
    plainly, by_load = got[0]["arrived"]["plain"], got[0]["arrived"]["by load"]
    for layer in range(2):
        assert sum(plainly[layer]) == sum(by_load[layer]) == ranks * TOKENS * K
        assert max(by_load[layer]) < max(plainly[layer])
        # Tokens take turns over copies by position, not by count: near what an even share would be.
        assert by_load[layer] == pytest.approx(got[0]["expected"][layer], rel=0.15)


def test_tokens_take_turns_over_the_copies() -> None:
    slots = Slots.of([1, 0, 1, 2, 1, 0], n_experts=3, ranks=2)
    expert_TK = torch.tensor([[1, 0], [1, 0], [1, 2], [1, 0], [0, 1], [3, 2]])
    assert slots.spread(expert_TK).tolist() == [[0, 1], [2, 5], [4, 3], [0, 5], [1, 2], [6, 3]]


@pytest.mark.parametrize(
    ("expert_S", "message"),
    [
        ([0, 1, 1, 0], "expert 2 has no slot"),
        ([0, 1, 2], "3 slots are not equally many on each of 2 ranks"),
        ([0, 1, 2, 3], "slot 3 holds expert 3, of 3"),
    ],
)
def test_slots_that_do_not_fit_are_refused(expert_S: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slots.of(expert_S, n_experts=3, ranks=2)
