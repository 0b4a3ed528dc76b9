"""The main job, as a newcomer runs it: `moelab demo --exit` trains a real MoE and prints what the store says about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moelab-demo-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.timeout(240)
def test_the_demo_trains_and_tells_what_is_in_the_store(home: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("DATABASE_URL", "REDIS_URL", "MOELAB_SECRET_KEY")}
    steps = 40
    settings = ["--set", f"training.steps={steps}", "--set", "training.eval_batches=2"]
    done = subprocess.run(
        [sys.executable, "-m", "moelab.cli", "demo", "--exit", "--port", "8600", *settings],
        env=environment | {"MOELAB_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["state"] == "succeeded"
    assert summary["steps"] == steps
    assert summary["routing_rows"] == steps * summary["layers"] > 0
    assert summary["val_loss"] < summary["first_loss"] - 1.0
    assert summary["tokens_per_s"] > 0
    left = subprocess.run(["pgrep", "-f", str(home)], capture_output=True, text=True).stdout.split()
    assert not left, "processes outlived the demo"
