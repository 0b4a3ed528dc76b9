"""Weights sharded over the ranks (parallel.shard) learn what they learn in one process, and their checkpoints are whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from moe.parallel import Mesh
from moe.train import corpus
from moe.train.batches import Batches
from moe.train.learner import Learner
from moe.train.ranks import Ranks
from moe.train.validation import validate
from spec.experiment import ExperimentSpec
from tests.moe.parallel.ranks import on_ranks
from tests.moe.train.tiny import HOME, tiny

STEPS = 2  # of a run, and of one that goes on from another's checkpoint
TOLERANCE = 1e-5  # relative, of float32 losses and norms; what the order of sums makes
MOE = {"n_experts": 4, "top_k": 2, "d_expert": 24, "n_shared": 1, "combine": "sigmoid_gate", "router": {"kind": "sigmoid_topk"}}
BALANCE = [{"kind": "loss_free_bias"}, {"kind": "z_loss"}]
CASES: dict[str, dict[str, Any]] = {
    "tied": {"model": {"d_model": 36, "moe": MOE | {"balance": BALANCE, "bias": "expert"}}},  # 36 rows and a gate of 1 do not divide by 8 or 2
    "recomputed, in two micro-batches": {
        "model": {"moe": MOE | {"balance": BALANCE}, "tie_embeddings": False},
        "training": {"activation_recompute": True, "grad_accumulation": 2},
    },
    "predicting ahead": {"model": {"moe": MOE | {"balance": BALANCE}, "mtp_depth": 1}},
    "cosine scores, whose temperature is one number": {
        "model": {"moe": {**MOE, "router": {"kind": "softmax_topk", "scorer": "cosine", "scorer_dim": 16}, "balance": [{"kind": "z_loss"}]}}
    },
    "only the MoE layers": {"model": {"moe": MOE | {"balance": BALANCE}}, "training": {"train": "only_moe"}},
}


def spec(case: str, data: int, expert: int) -> ExperimentSpec:
    changes = CASES[case]
    optimizer = {"grad_clip": 0.5, "schedule": "constant", "warmup_steps": 0, "lr": 1e-3}
    training = {"steps": 100, "batch_size": 8, **changes.get("training", {})}
    return tiny(model=changes["model"], optimizer=optimizer, training=training, parallel={"data": data, "expert": expert, "shard": True})


def learner(case: str, data: int, expert: int) -> Learner:
    """As `moe.train` makes it, of this process's rank; with compiled blocks where four share replicas and activations are recomputed."""
    made, rank = spec(case, data, expert), dist.get_rank() if dist.is_initialized() else 0
    batches = Batches(corpus.load(made.data, HOME), made.data.seq_len, made.training.batch_size, made.seed)
    mesh = Mesh.of(data, expert) if expert > 1 else None
    learning = Learner(made, batches, Ranks(rank, data * expert, torch.device("cpu"), mesh, shard=data * expert > 1))
    if (data, expert) == (4, 1) and "recomputed" in case:
        learning.model.compile_blocks("eager")
    return learning


def told(learning: Learner, first: int) -> list[list[float]]:
    """Losses, gradient norm and the experts' counts of STEPS steps."""
    steps = [learning.train_step(step, lambda: (False, False)).figures for step in range(first, first + STEPS)]
    return [
        [figures.lm_loss, figures.loss, figures.grad_norm, *map(float, figures.tokens_LE.flatten())]
        for figures in steps
        if figures.tokens_LE is not None
    ]


def validated(learning: Learner) -> float:
    ranks, batches = learning.ranks, learning.batches
    found = validate(
        learning.model, batches, sequences=3, micro_batch=1, ranks=ranks, autocast=learning.autocast, interrupted=lambda: False, probe_batch=True
    )
    assert found is not None
    return found.loss


def reductions(learning: Learner, step: int) -> int:
    """How often a step reduces gradients of shards."""
    with patch.object(dist, "reduce_scatter_single", wraps=dist.reduce_scatter_single) as counted:
        learning.learn(step, 0.0)
    return counted.call_count


def learnt(case: str, data: int, expert: int, saved: Path) -> dict[str, Any]:
    """A run of STEPS steps, its validation and its checkpoint; then one that goes on from `saved`."""
    learning = learner(case, data, expert)
    steps, validation, tensors = told(learning, 1), validated(learning), learning.tensors()
    other, wanted = learner(case, data, expert), torch.load(saved)
    with other.whole_model() as model:  # as a start from weights does
        assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
        model.load_state_dict(wanted["model"])
    filled = other.tensors()["model"]
    if not dist.get_rank():
        assert all(torch.equal(filled[name], tensor) for name, tensor in wanted["model"].items())
    other.load(wanted)
    went_on = told(other, STEPS + 1)
    whole = {} if dist.get_rank() else tensors
    return {"steps": steps, "validation": validation, "tensors": whole, "went on": went_on, "reductions": reductions(other, 9)}


def every_case(layouts: list[tuple[int, int]], directory: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Of one rank: every case where each rank has all experts, two where they are shared out too."""
    cases = {layout: list(CASES) if layout[1] == 1 else list(CASES)[:2] for layout in layouts}
    return {layout: {case: learnt(case, *layout, directory / f"{case}.pt") for case in cases[layout]} for layout in layouts}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one process makes of every case, and where its checkpoints are."""
    directory = tmp_path_factory.mktemp("alone")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs = {}
    for case in CASES:
        learning = learner(case, 1, 1)
        steps, validation, tensors = told(learning, 1), validated(learning), learning.tensors()
        torch.save(tensors, directory / f"{case}.pt")
        copied = torch.load(directory / f"{case}.pt")
        runs[case] = {"steps": steps, "validation": validation, "tensors": copied, "went on": told(learning, STEPS + 1)}
    return directory, runs


@pytest.mark.parametrize("layouts", [[(2, 1), (1, 2)], pytest.param([(4, 1), (2, 2)], marks=pytest.mark.slow)])
def test_shards_learn_what_one_process_learns(alone: tuple[Path, dict[str, Any]], tmp_path: Path, layouts: list[tuple[int, int]]) -> None:
    directory, runs = alone
    ranks = on_ranks(layouts[0][0] * layouts[0][1], tmp_path, every_case, layouts, directory)
    for layout in layouts:
        for case, first in ranks[0][layout].items():
            one = runs[case]
            for mine in (rank[layout][case] for rank in ranks):
                assert [mine["validation"]] == pytest.approx([one["validation"]], rel=TOLERANCE), case
                for part in ("steps", "went on"):
                    assert len(mine[part]) == STEPS
                    for made, wanted in zip(mine[part], one[part], strict=True):
                        assert made == pytest.approx(wanted, rel=TOLERANCE), f"{layout}, {case}: {part}"
            check_tensors(first["tensors"], one["tensors"], case)
            ahead = 1 if case == "predicting ahead" else 0
            assert first["reductions"] == 2 + ahead + (case != "only the MoE layers"), f"{case}: one for each block and one for the rest"


def check_tensors(got: dict[str, dict[str, torch.Tensor]], wanted: dict[str, dict[str, torch.Tensor]], case: str) -> None:
    """Whole plain tensors, the same but for what AdamW makes of the last bits of gradients near 0: a share of the rate."""
    for file, tensors in wanted.items():
        assert got[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert type(got[file][name]) is torch.Tensor and got[file][name].shape == tensor.shape, name
            error = (got[file][name] - tensor).norm() / tensor.norm().clamp_min(1e-6)
            assert error < 1e-4, f"{case}: {name} is off by {error:.1e}"
