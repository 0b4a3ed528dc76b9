"""Runs with every kind of router: an interruption changes nothing; what routers tell becomes metrics; hash tables come from the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.train import checkpoint
from moe.train.stop import Stopped
from moe.train.token_statistics import token_frequency
from spec import events
from spec.routing import TRAITS
from tests.moe.train.tiny import Run

Start = Callable[..., Run]
FIGURES = {
    "gshard": ["second_kept"],
    "noisy_topk": ["noise_std"],
    "expert_choice": ["unserved_tokens"],
    "linear_assignment": ["first_choice"],
    "sinkhorn": ["sinkhorn_error"],
    "reinforce": ["policy_loss"],
}
SHORT = {"steps": 4, "batch_size": 4, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 2, "grad_accumulation": 2}


def routed(kind: str, **router: Any) -> dict[str, dict[str, Any]]:
    traits = TRAITS[kind]
    moe: dict[str, Any] = {"n_experts": 4, "top_k": 4 if kind == "all_experts" else traits.top_k or 2, "d_expert": 16}
    moe["router"] = {"kind": kind, "jitter": 0.1 if traits.learned else 0.0, "random_share": 0.1 if traits.biasable else 0.0, **router}
    moe["balance"] = [{"kind": "switch_aux"}] if traits.learned else []
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}
    return {"model": {"n_layers": 2, "d_model": 32, "d_ff": 64, "attention": attention, "moe": moe}, "training": SHORT}


def losses(run: Run) -> list[float]:
    return [float(event.scalars[0]) for event in run.steps().values()]


@pytest.mark.parametrize("kind", TRAITS)
def test_every_kind_trains_and_goes_on_bit_identically(run: Start, tmp_path: Path, kind: str) -> None:
    undisturbed = run(out=tmp_path / "undisturbed", **routed(kind))
    end = undisturbed.go()
    first = run(attempt=1, **routed(kind))
    with pytest.raises(Stopped):
        first.go(lambda step: setattr(first.requests, "stop", step == 3))
    second = run(attempt=2, **routed(kind))
    again = second.go()
    assert losses(first) + losses(second) == losses(undisturbed)
    assert again.validation_loss == end.validation_loss


@pytest.mark.parametrize("kind", FIGURES)
def test_what_a_kind_tells_of_itself_is_a_metric(run: Start, kind: str) -> None:
    done = run(**routed(kind))
    done.go()
    names = next(event for event in done.events if isinstance(event, events.MetricsDeclared)).names
    assert [name for name in names if name.startswith("router/")] == [f"router/{name}" for name in FIGURES[kind]]
    for event in done.steps().values():
        assert event.scalars.shape == (len(names),) and np.isfinite(event.scalars).all()


def tables(run: Run) -> list[Tensor]:
    return [router.table_VK for router in run.learner.model.hash_routers()]


def test_balanced_tables_even_out_the_text(run: Start, tmp_path: Path) -> None:
    balanced, random = run(**routed("hash", hash="balanced")), run(out=tmp_path / "random", **routed("hash", hash="random"))
    frequency_V = torch.from_numpy(token_frequency(balanced.learner.batches.domains, 264))

    def worst(table_VK: Tensor) -> float:
        load_E = torch.zeros(4, dtype=torch.int64).index_add_(0, table_VK.flatten(), frequency_V.repeat_interleave(2))
        return float(load_E.max() / load_E.double().mean())

    assert len(tables(balanced)) == 2 and not torch.equal(*tables(balanced))
    assert max(map(worst, tables(balanced))) < 1.03 < max(map(worst, tables(random)))


def test_frequencies_count_domains_as_often_as_they_are_read(run: Start) -> None:
    mixed = run(data={"domains": ["tables", "code"], "weights": [0.3, 0.7], "seq_len": 32}).learner.batches
    steps = range(1, 1025)  # 4096 windows: the cycle in which the shares are exact
    rows = np.concatenate([mixed.micro_batch(step, 0, 1, 0, 1)[0].flatten().numpy() for step in steps])
    read_V, expected_V = np.bincount(rows, minlength=264) / len(rows), token_frequency(mixed.domains, 264)
    by_size_V = token_frequency([replace(domain, weight=None) for domain in mixed.domains], 264)
    assert np.abs(read_V - expected_V / expected_V.sum()).sum() < 0.05
    assert np.abs(read_V - by_size_V / by_size_V.sum()).sum() > 0.1


def test_tables_are_the_same_at_every_start_and_kept_with_the_weights(run: Start, tmp_path: Path) -> None:
    for kind in ("random", "balanced", "clustered"):
        one, other = (run(out=tmp_path / f"{kind}-{i}", **routed("hash", hash=kind)) for i in range(2))
        assert all(map(torch.equal, tables(one), tables(other)))
        one.training.position.step = 1
        one.training.save()
        tensors, _ = checkpoint.load(one.out / "checkpoints", 1)
        kept = [tensor for name, tensor in tensors["model"].items() if name.endswith("table_VK")]
        assert len(kept) == 2 and all(map(torch.equal, kept, tables(one)))
        one.training.close()
        other.training.close()


def test_clustered_tables_put_tokens_of_like_company_together(run: Start) -> None:
    """Capital letters and digits stand in other company than small letters: within each kind more pairs share their first expert."""
    table_V = tables(run(**routed("hash", hash="clustered")))[0][:, 0]

    def share(one: range, other: range) -> float:
        pairs = [(a, b) for a in one for b in other if a != b]
        return sum(int(table_V[a] == table_V[b]) for a, b in pairs) / len(pairs)

    small, digits = range(ord("a"), ord("z") + 1), range(ord("0"), ord("9") + 1)
    assert min(share(small, small), share(digits, digits)) > share(small, digits) + 0.2
