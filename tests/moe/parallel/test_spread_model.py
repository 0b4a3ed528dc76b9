"""A whole model with its experts on several ranks: overlap and clocks change no bit; limits keep tokens on few ranks; who waits is seen."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.laps import Laps
from moe.model import build_model
from moe.parallel import Mesh
from spec.events import PARTS
from spec.model import Model
from tests.moe.parallel.ranks import on_ranks

LAYOUTS = [(1, 2), (1, 4)]  # data, expert
D, K, LAYERS, TOKENS = 16, 3, 2, 24
LATE_S = 0.5


def model_of(ranks: int) -> Model:
    """Every token may go to half of the ranks."""
    router = {"kind": "softmax_topk", "n_groups": ranks, "top_groups": ranks // 2}
    balance = [{"kind": "device_aux", "n_devices": ranks}, {"kind": "communication_aux", "n_devices": ranks}, {"kind": "global_aux"}]
    moe = {"n_experts": 4 * ranks, "top_k": K, "d_expert": 8, "n_shared": 1, "combine": "sigmoid_gate", "router": router, "balance": balance}
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}
    return Model.model_validate({"n_layers": LAYERS, "d_model": D, "d_ff": 24, "vocab_size": 40, "attention": attention, "moe": moe})


def step(mesh: Mesh, *, recompute: bool = False, laps: Laps | None = None) -> tuple[list[Tensor], Any]:
    """Loss and gradients from the same weights and this rank's tokens; and what the routers did."""
    torch.manual_seed(0)
    model = build_model(model_of(mesh.expert), recompute=recompute, mesh=mesh)
    torch.manual_seed(mesh.rank)
    tokens = torch.randint(0, 40, (2, TOKENS // 2 + 1))
    output = model(tokens[:, :-1], tokens[:, 1:], laps=laps)
    assert output.lm_loss is not None
    loss = output.lm_loss + output.balance_loss
    if laps is not None:
        laps.in_backward = True
        laps.mark("other")
    loss.backward()
    if laps is not None:
        laps.mark("other")
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)], output


def on_each(data: int, expert: int) -> dict[str, Any]:
    """One rank's share of everything that is asserted."""
    mesh = Mesh.of(data, expert)
    plain, output = step(replace(mesh, overlap=False))
    laps, again = Laps(torch.device("cpu")), Laps(torch.device("cpu"))
    overlapped, timed, recomputed = step(mesh)[0], step(mesh, laps=laps)[0], step(mesh, recompute=True, laps=again)[0]
    late = Laps(torch.device("cpu"))
    if mesh.rank == 1:
        time.sleep(LATE_S)
    step(mesh, laps=late)
    return {
        "equal": [all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)) for other in (overlapped, timed, recomputed)],
        "sent": output.stats.sent_LP,
        "chosen": torch.stack([choice.expert_TK for choice in output.choices]),
        "bytes": (laps.sent_bytes, again.sent_bytes),
        "waited_s": late.milliseconds()[PARTS.index("waiting")].sum().item() / 1000,
        "timed": {part for part, spent in zip(PARTS, laps.milliseconds().sum(1), strict=True) if spent > 0},
    }


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    data, expert = request.param
    return on_ranks(data * expert, Path(tmp_path_factory.mktemp("spread")), on_each, data, expert)


def test_overlap_a_clock_and_recomputation_change_no_bit(ranks: list[dict[str, Any]]) -> None:
    assert [rank["equal"] for rank in ranks] == [[True] * 3] * len(ranks)


def test_rows_and_bytes_are_those_of_the_choices(ranks: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(ranks):
        wanted = [[sum(int(e) // 4 == shard for e in layer.flatten()) for shard in range(len(ranks))] for layer in got["chosen"]]
        assert got["sent"].tolist() == wanted
        crossing = sum(count for layer in wanted for shard, count in enumerate(layer) if shard != rank)
        # Out and back: a rank sends the rows that it chose elsewhere, and returns those that others chose here; the gradients the other way.
        returned = sum(int(other["sent"][layer, rank]) for i, other in enumerate(ranks) if i != rank for layer in range(LAYERS))
        assert got["bytes"][0] == 4 * D * 2 * (crossing + returned)
        assert got["bytes"][1] == 4 * D * 3 * (crossing + returned)


def test_a_token_goes_to_the_ranks_of_its_groups_alone(ranks: list[dict[str, Any]]) -> None:
    most = len(ranks) // 2
    reached = [len({int(e) // 4 for e in token}) for got in ranks for layer in got["chosen"] for token in layer]
    assert max(reached) == min(most, K)


def test_who_is_early_waits(ranks: list[dict[str, Any]]) -> None:
    waited = [got["waited_s"] for got in ranks]
    assert all(seconds > 0.7 * LATE_S for rank, seconds in enumerate(waited) if rank != 1), waited
    assert waited[1] < min(seconds for rank, seconds in enumerate(waited) if rank != 1)
    wanted = {"attention", "router", "dispatch", "experts", "combine", "dense", "head", "communication", "waiting", "other"}
    assert all(got["timed"] >= wanted for got in ranks)
