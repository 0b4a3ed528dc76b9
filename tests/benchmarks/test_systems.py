"""The table of systems: what a real run leaves in it, what is not trained again, and what a failure looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import systems
from spec.accounting import price
from spec.experiment import ExperimentSpec


def tiny(path: Path, name: str = "nano-mixtral") -> ExperimentSpec:
    plain = systems.same_budget(name, 3, 1).model_dump()
    plain["model"].update(n_layers=2, d_model=32)
    plain["data"].update(source="files", paths=[str(path)], seq_len=32)
    return ExperimentSpec.model_validate(plain)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": f"The square of {n} is {n * n}, its cube is {n**3}.\n"}) for n in range(400)]
    path = tmp_path / "numbers.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_run_leaves_its_figures(text: Path) -> None:
    spec = tiny(text)
    entry = systems.trained(spec)
    cost = price(spec)
    assert (entry["total_params"], entry["active_params"]) == (cost.total_params, cost.active_params.with_embeddings)
    assert 4 < entry["validation_loss"] < 7 and entry["tokens_per_s"] > 0
    assert entry["experts"] == 16 and 0 <= entry["dead_experts"] < 16 and entry["max_vio"] > 0 and entry["dropped_share"] == 0
    assert systems.is_done(entry, spec) and not systems.is_done(entry, tiny(text, "nano-random"))
    assert "| Nano Mixtral | " in systems.page({"nano-mixtral": entry})


def test_a_failure_is_recorded_with_its_reason_and_tried_again(tmp_path: Path) -> None:
    spec = tiny(tmp_path / "nothing-here")
    entry = systems.trained(spec)
    assert entry["failure"] == "config_invalid" and "nothing-here" in entry["detail"]
    assert not systems.is_done(entry, spec)
    assert "| Nano Mixtral | failed: config_invalid |" in systems.page({"nano-mixtral": entry})


def test_what_is_done_is_kept_and_what_is_missing_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []

    def instead(spec: ExperimentSpec) -> dict[str, Any]:
        made.append(spec.name)
        machine = {"cores": 2, "processor": "any", "torch": "2"}
        if spec.name == "nano-hash":
            return {"spec": systems.digest(spec), "machine": machine, "failure": "oom"}
        keys = ("total_params", "active_params", "experts", "tokens_per_s", "validation_loss", "max_vio_global", "max_vio", "dead_experts")
        return {"spec": systems.digest(spec), "machine": machine, "steps": 3, "dropped_share": None} | dict.fromkeys(keys, len(made))

    monkeypatch.setattr(systems, "trained", instead)
    paths = ["--record", str(tmp_path / "r.json"), "--page", str(tmp_path / "p.md")]
    asked = ["--steps", "3", "--only", "nano-hash", "nano-dense", *paths]
    assert systems.main(asked) == {"steps": 3, "tokens": 3 * 2048, "trained": 1, "kept": 0, "failed": 1}
    assert systems.main(asked) == {"steps": 3, "tokens": 3 * 2048, "trained": 0, "kept": 1, "failed": 1}
    assert systems.main(["--steps", "4", "--only", "nano-dense", *paths])["trained"] == 1
    assert sorted(made) == ["nano-dense", "nano-dense", "nano-hash", "nano-hash"]
    lines = (tmp_path / "p.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| Nano")]
    assert rows[0].startswith("| Nano dense | 4.000 |") and rows[1].startswith("| Nano Hash Layers | failed: oom |")
    assert {row.count("|") for row in rows} == {11}


def test_every_system_has_the_same_tokens() -> None:
    budgets = {
        (spec.training.steps * spec.training.batch_size * spec.data.seq_len, spec.seed, tuple(spec.data.domains))
        for spec in (systems.same_budget(name, 7, 2) for name in systems.NANO)
    }
    assert budgets == {(7 * 2048, 0, ("code", "prose", "tables"))}
