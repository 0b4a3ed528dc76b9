"""`python -m moe.train` as others see it: exit codes, result.json, signals, and the ranks of one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.train import checkpoint, stop
from spec import events
from spec.experiment import ExperimentSpec
from tests.moe.train.tiny import read_events, tiny


def start(spec: ExperimentSpec | str, out: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The trainer as a process of its own, on one thread."""
    out.mkdir(parents=True, exist_ok=True)
    source = spec
    if isinstance(spec, ExperimentSpec):
        source = str(out / "spec.json")
        (out / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "moe.train", str(source), "--out", str(out), *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    output = process.communicate(timeout=timeout_s)[0]
    return process.returncode, output


def result(out: Path, attempt: int = 0) -> dict[str, Any]:
    return json.loads((out / "attempts" / str(attempt) / "result.json").read_text())


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def steps(out: Path, attempt: int = 0) -> dict[int, events.StepDone]:
    return {event.step: event for event in read_events(out, attempt) if isinstance(event, events.StepDone)}


def test_signals_save_and_stop_and_the_next_attempt_goes_on(tmp_path: Path) -> None:
    out, spec = tmp_path / "run", tiny(training={"steps": 20_000, "checkpoint_every": 0, "eval_every": 0})
    process = start(spec, out, "--attempt", "1")
    wait_until(lambda: (out / "attempts/1/events.spool").exists() and len(steps(out, 1)) > 5)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(checkpoint.steps(out / "checkpoints")) == 1)
    process.send_signal(signal.SIGUSR2)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert time.monotonic() - asked < 10, "SIGKILL would have come by now"
    assert code == stop.STOPPED, output
    last = checkpoint.steps(out / "checkpoints")[-1]
    assert result(out, 1) == {"outcome": "stopped", "reason": "stopped", "detail": f"stopped on request after step {last}"}
    assert list(steps(out, 1)) == list(range(1, last + 1))
    assert "Current thread" in output, "SIGUSR2 dumps the stacks"

    shorter = tiny(training={"steps": last + 3, "checkpoint_every": 0, "eval_every": 0})
    code, output = finish(start(shorter, out, "--attempt", "2"))
    assert code == stop.FINISHED, output
    assert list(steps(out, 2)) == [last + 1, last + 2, last + 3]
    assert result(out, 2)["outcome"] == "succeeded"
    assert f"going on after step {last}" in output


def test_a_loss_that_overflows_is_a_reason_of_its_own(tmp_path: Path) -> None:
    # The decoupled decay multiplies each matrix by 1 - 10 * 10 = -99 in every step.
    exploding = tiny(optimizer={"lr": 10, "weight_decay": 10, "warmup_steps": 0, "schedule": "constant"}, training={"steps": 200})
    code, output = finish(start(exploding, tmp_path))
    assert code == stop.NAN_LOSS, output
    assert result(tmp_path)["outcome"] == "failed"
    assert result(tmp_path)["reason"] == "nan_loss"
    assert f"step {max(steps(tmp_path))}: the " in result(tmp_path)["detail"]


def test_a_spec_that_cannot_be_trained_is_refused_field_by_field(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model": {"d_model": 7, "moe": {"top_k": 9}}}')
    code, output = finish(start(str(tmp_path / "bad.json"), tmp_path))
    assert code == stop.SPEC_REFUSED
    assert result(tmp_path)["reason"] == "config_invalid"
    assert "model.d_model: " in output
    assert "model.moe.top_k: top_k 9 > n_experts 8" in output
    assert "Traceback" not in output


def test_without_a_compiler_there_is_no_compiled_run(tmp_path: Path) -> None:
    code, output = finish(start(tiny(training={"compile": True}), tmp_path, PATH=str(tmp_path), CXX="no-such-compiler"))
    assert code == stop.SPEC_REFUSED
    assert "training.compile: needs a C++ compiler" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_it_is_the_same_run_on_one_rank_and_on_two_that_share_the_experts(tmp_path: Path) -> None:
    training = {"steps": 4, "eval_every": 2, "checkpoint_every": 0}
    alone = start(tiny(training=training), tmp_path / "eager")
    compiled = start(tiny(training={**training, "compile": True}), tmp_path / "compiled")
    spread = tiny(training={**training, "compile": True}, parallel={"expert": 2})
    ranks = [start(spread, tmp_path / "two", RANK=str(rank), WORLD_SIZE="2", MOELAB_RENDEZVOUS=str(tmp_path / "store")) for rank in (0, 1)]
    for process in (alone, compiled, *ranks):
        code, output = finish(process, timeout_s=900)
        assert code == stop.FINISHED, output
    eager = steps(tmp_path / "eager")
    for run, most in (("compiled", 1e-5), ("two", 1e-3)):  # two ranks: the Switch loss is each rank's own
        for step, one in steps(tmp_path / run).items():
            assert one.scalars[:2] == pytest.approx(eager[step].scalars[:2], rel=most), f"{run}, step {step}"


def test_two_ranks_make_the_run_of_one(tmp_path: Path) -> None:
    # Without a Switch loss, which is a product of means over each rank's tokens, the sum of the gradients is the same.
    balance = [{"kind": "loss_free_bias"}, {"kind": "z_loss"}]
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 32, "router": {"kind": "sigmoid_topk"}, "balance": balance}
    training = {"steps": 8, "eval_every": 4, "checkpoint_every": 5}
    alone = start(tiny(model={"moe": moe}, training=training), tmp_path / "one")
    both = tiny(model={"moe": moe}, training=training, parallel={"data": 2})
    store = str(tmp_path / "rendezvous")
    ranks = [start(both, tmp_path / "two", RANK=str(rank), WORLD_SIZE="2", MOELAB_RENDEZVOUS=store) for rank in (0, 1)]
    for process in (alone, *ranks):
        code, output = finish(process)
        assert code == stop.FINISHED, output
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 9))
    for step in one:
        assert two[step].scalars[:4] == pytest.approx(one[step].scalars[:4], rel=1e-4), f"losses and gradient norm of step {step}"
        assert two[step].tensors["expert_tokens"].sum(axis=1).tolist() == [256, 256]
        assert two[step].tensors["phase_ms"].shape == (2, 5)
    assert two[1].tensors["expert_tokens"].tolist() == one[1].tensors["expert_tokens"].tolist()
    validations = [[event.loss for event in read_events(tmp_path / run) if isinstance(event, events.EvalDone)] for run in ("one", "two")]
    assert validations[1] == pytest.approx(validations[0], rel=1e-4)
    assert checkpoint.steps(tmp_path / "two" / "checkpoints") == [5, 8]


def test_all_ranks_stop_when_one_is_asked(tmp_path: Path) -> None:
    spec = tiny(training={"steps": 100_000, "eval_every": 0, "checkpoint_every": 0}, parallel={"data": 2, "shard": True})
    store = str(tmp_path / "rendezvous")
    ranks = [start(spec, tmp_path, RANK=str(rank), WORLD_SIZE="2", MOELAB_RENDEZVOUS=store) for rank in (0, 1)]
    wait_until(lambda: (tmp_path / "attempts/0/events.spool").exists() and len(steps(tmp_path)) > 3)
    ranks[1].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in ranks]
    assert [code for code, _ in ended] == [stop.STOPPED] * 2, ended
    assert checkpoint.steps(tmp_path / "checkpoints") == [max(steps(tmp_path))]


def test_the_number_of_processes_must_be_the_spec_s(tmp_path: Path) -> None:
    code, output = finish(start(tiny(parallel={"data": 2}), tmp_path))
    assert code == stop.SPEC_REFUSED
    assert "parallel.data: parallel.expert x parallel.data = 2 processes, but 1 were started" in output
