"""The same run on one process and on ranks that share the experts, the batch, or both; and checkpoints that do not know which."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe.train import checkpoint, stop
from spec import events
from spec.accounting import price
from spec.events import PARTS, PASSES
from spec.experiment import ExperimentSpec
from tests.moe.train.test_process import finish, start, steps
from tests.moe.train.tiny import read_events, tiny

LAYOUTS = [(1, 1), (1, 2), (2, 2)]  # data, expert; data alone is in tests/moe/train/test_process.py
HALF, WHOLE = 4, 8  # steps
TOLERANCE = 1e-5  # relative, of float32 losses; what the order of sums makes


def spec(data: int, expert: int, steps: int) -> ExperimentSpec:
    """Every part that ranks might get wrong: biases of experts, a shared expert, a selection bias, clipping. No term that is a product of means."""
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 24, "n_shared": 1, "bias": "expert", "router": {"kind": "sigmoid_topk"}}
    balance: list[dict[str, Any]] = [{"kind": "loss_free_bias"}, {"kind": "z_loss"}]
    return tiny(
        model={"moe": moe | {"balance": balance}},
        optimizer={"grad_clip": 0.5, "schedule": "constant", "warmup_steps": 0, "lr": 1e-3},
        training={"steps": steps, "eval_every": HALF, "eval_batches": 1, "checkpoint_every": 0},
        parallel={"data": data, "expert": expert},
        telemetry={"phases_every": HALF},
    )


def train(layout: tuple[int, int], steps: int, out: Path, store: Path, attempt: int = 0) -> None:
    size = layout[0] * layout[1]
    ranks = [
        start(spec(*layout, steps), out, "--attempt", str(attempt), RANK=str(rank), WORLD_SIZE=str(size), MOELAB_RENDEZVOUS=str(store))
        for rank in range(size)
    ]
    for rank in ranks:
        code, output = finish(rank)
        assert code == stop.FINISHED, output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """Every layout's run of eight steps."""
    home = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        train(layout, WHOLE, home / f"{layout}", home / f"store-{layout}")
    return {layout: home / f"{layout}" for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_losses_norms_and_counts_are_those_of_one_process(runs: dict[tuple[int, int], Path], layout: tuple[int, int]) -> None:
    alone, spread = steps(runs[1, 1]), steps(runs[layout])
    assert list(alone) == list(spread) == list(range(1, WHOLE + 1))
    for step, one in alone.items():
        assert spread[step].scalars[:4] == pytest.approx(one.scalars[:4], rel=TOLERANCE), f"losses and gradient norm of step {step}"
        assert spread[step].tensors["expert_tokens"].tolist() == one.tensors["expert_tokens"].tolist()
    validations = [[event.loss for event in read_events(runs[which]) if isinstance(event, events.EvalDone)] for which in ((1, 1), layout)]
    assert validations[1] == pytest.approx(validations[0], rel=TOLERANCE)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[1] > 1])
def test_traffic_is_what_the_routing_makes_it(runs: dict[tuple[int, int], Path], layout: tuple[int, int]) -> None:
    """A rank sends its tokens' k copies in every layer, to its own replica alone; who receives is who holds the chosen experts."""
    data, expert = layout
    for step in steps(runs[layout]).values():
        traffic_LRR = step.tensors["rank_traffic"]
        assert traffic_LRR.shape == (2, data * expert, data * expert)
        assert traffic_LRR.sum(2).tolist() == [[2 * 4 * 32 // (data * expert)] * (data * expert)] * 2
        for shard in range(expert):
            held = step.tensors["expert_tokens"][:, shard * 4 // expert : (shard + 1) * 4 // expert]
            assert traffic_LRR[:, :, shard::expert].sum((1, 2)).tolist() == held.sum(1).tolist()
        if data > 1:
            assert not traffic_LRR[:, :expert, expert:].any() and not traffic_LRR[:, expert:, :expert].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_tells_of_the_whole_model_whatever_its_first_rank_holds(runs: dict[tuple[int, int], Path], layout: tuple[int, int]) -> None:
    told = read_events(runs[layout])
    (started,) = (event for event in told if isinstance(event, events.RunStarted))
    *_, saved = (event for event in told if isinstance(event, events.CheckpointSaved))
    weights, state = checkpoint.load(runs[layout] / "checkpoints", saved.step)
    assert started.total_params == sum(tensor.numel() for name, tensor in weights["model"].items() if not name.endswith("bias_E"))
    assert state["spec"]["parallel"]["expert"] == layout[1]
    assert 0 <= saved.size_bytes - price(spec(*layout, WHOLE)).bytes.checkpoint < 20_000, "what is guarded against is what is written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampled_steps_tell_their_parts_and_bytes(runs: dict[tuple[int, int], Path], layout: tuple[int, int]) -> None:
    size, waiting = layout[0] * layout[1], PARTS.index("waiting")
    for step, told in steps(runs[layout]).items():
        assert ("part_ms" in told.tensors) == (step % HALF == 0)
        if step % HALF:
            continue
        assert told.tensors["part_ms"].shape == (size, len(PARTS), len(PASSES))
        assert told.tensors["part_ms"].sum((1, 2)) == pytest.approx(told.tensors["phase_ms"].sum(1), rel=0.2), "parts make up the step"
        assert (told.tensors["part_ms"][:, waiting] > 0).all() == (size > 1)
        if layout[1] > 1:  # rows cross four times, in float32 of width 32
            crossing = told.tensors["rank_traffic"].sum() - np.trace(told.tensors["rank_traffic"], axis1=1, axis2=2).sum()
            assert told.tensors["sent_bytes"].sum() == 4 * 4 * 32 * crossing


@pytest.mark.parametrize(("saved", "resumed"), [((1, 2), (1, 1)), ((1, 2), (2, 1)), pytest.param((1, 2), (1, 4), marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_any_layout(
    runs: dict[tuple[int, int], Path], tmp_path: Path, saved: tuple[int, int], resumed: tuple[int, int]
) -> None:
    half = runs[saved].parent / f"half-{saved}"
    if not half.exists():
        train(saved, HALF, half, half.parent / f"half-store-{saved}")
    out = tmp_path / "run"
    shutil.copytree(half, out)
    assert checkpoint.steps(out / "checkpoints") == [HALF]
    train(resumed, WHOLE, out, tmp_path / "store", attempt=1)
    alone, went_on = steps(runs[1, 1]), steps(out, 1)
    assert list(went_on) == list(range(HALF + 1, WHOLE + 1))
    for step, made in went_on.items():
        assert made.scalars[:4] == pytest.approx(alone[step].scalars[:4], rel=TOLERANCE)
