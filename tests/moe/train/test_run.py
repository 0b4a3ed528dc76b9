"""Whole runs of a tiny model in this process: what they report, and that an interruption changes nothing."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.train import checkpoint, telemetry
from moe.train.stop import DISK_FULL, ERROR, OUT_OF_MEMORY, PEER_LOST, DiskFull, NotFinite, SpecRefused, Stopped, classify
from spec import events
from spec.accounting import price
from tests.moe.train.tiny import HOME, Run, read_events, tiny

Start = Callable[..., Run]
GOLDEN = [5.52718, 5.39937, 5.16762, 4.87177, 4.49795, 4.18252, 4.02178, 4.0119, 3.85999]


def losses(run: Run) -> dict[int, float]:
    """The loss of each step, to the last bit."""
    return {step: float(event.scalars[0]) for step, event in run.steps().items()}


def names_of(run: Run) -> list[str]:
    """The scalars that the run declared, once."""
    (declared,) = (event for event in run.events if isinstance(event, events.MetricsDeclared))
    return declared.names


def assert_same_weights(one: Run, other: Run) -> None:
    weights, others = one.learner.tensors(), other.learner.tensors()
    for file, group in weights.items():
        assert group.keys() == others[file].keys()
        assert all(torch.equal(tensor, others[file][name]) for name, tensor in group.items()), file


# ----- what a run reports


def test_a_run_reports_every_step_whole(run: Start) -> None:
    done = run()
    end = done.go()
    told = done.events
    start, names = told[0], told[1]
    assert isinstance(start, events.RunStarted)
    assert isinstance(names, events.MetricsDeclared)
    assert (start.steps, start.moe_layers, start.n_experts, start.top_k) == (12, [0, 1], 4, 2)
    assert (start.tokens_per_step, start.world_size, start.devices, start.resumed_from_step) == (128, 1, ["cpu"], None)
    assert start.total_params == sum(parameter.numel() for parameter in done.learner.model.parameters())
    assert start.balance_terms == ["switch_aux", "z_loss"]
    router = ["max_vio", "load_cv", "router_entropy", "dead_experts", "dropped_share", "max_logit"]
    speed = ["tokens_per_s", "step_ms", "tflop_per_s"]
    assert names.names == ["loss", "lm_loss", "balance/switch_aux", "balance/z_loss", "grad_norm", "lr", *speed, *router]
    assert [event.step for event in told if isinstance(event, events.StepDone)] == list(range(1, 13))
    assert [event.step for event in told if isinstance(event, events.EvalDone)] == [5, 10, 12]
    assert [event.step for event in told if isinstance(event, events.CheckpointSaved)] == [4, 8, 12]
    assert checkpoint.steps(done.out / "checkpoints") == [4, 8, 12]
    assert end.step == 12
    for event in done.steps().values():
        assert event.scalars.shape == (len(names.names),)
        assert np.isfinite(event.scalars).all()
        shapes = {name: array.shape for name, array in event.tensors.items()}
        assert shapes == {
            "expert_tokens": (2, 4),
            "router_prob": (2, 4),
            "dropped": (2, 4),
            "phase_ms": (1, len(start.phases)),
            "balance_loss": (2, 2),
            "router_entropy": (2,),
            **({"part_ms": (1, 12, 2)} if event.step == 10 else {}),
        }
        assert event.tensors["expert_tokens"].sum(axis=1).tolist() == [128 * 2, 128 * 2]
        assert event.tensors["router_prob"].sum(axis=1) == pytest.approx([1, 1], abs=1e-5)


def test_the_scalars_follow_from_the_tensors(run: Start) -> None:
    tight = {"kind": "factor", "factor": 1.0}
    done = run(model={"moe": {"n_experts": 4, "top_k": 1, "d_expert": 32, "router": {"kind": "switch"}, "capacity": tight}})
    done.go()
    names = names_of(done)
    for event in done.steps().values():
        scalars = dict(zip(names, event.scalars.tolist(), strict=True))
        counts = event.tensors["expert_tokens"].astype(float).tolist()
        vio = [max(row) / (sum(row) / len(row)) - 1 for row in counts]
        assert scalars["max_vio"] == pytest.approx(sum(vio) / 2, rel=1e-6)
        cv = [(sum((n - sum(row) / 4) ** 2 for n in row) / 4) ** 0.5 / (sum(row) / 4) for row in counts]
        assert scalars["load_cv"] == pytest.approx(sum(cv) / 2, rel=1e-6)
        assert scalars["dead_experts"] == sum(n == 0 for row in counts for n in row)
        over = [[max(0, n - 32) for n in row] for row in counts]
        assert event.tensors["dropped"].tolist() == over
        assert scalars["dropped_share"] == pytest.approx(sum(map(sum, over)) / 256, rel=1e-6)
        weighted = 0.01 * float(event.tensors["balance_loss"].sum())
        assert scalars["balance/switch_aux"] == pytest.approx(weighted, rel=1e-5)
        assert scalars["loss"] == pytest.approx(scalars["lm_loss"] + weighted, rel=1e-5)
        assert scalars["router_entropy"] == pytest.approx(float(event.tensors["router_entropy"].mean()), rel=1e-5)


def test_the_utilisation_is_the_priced_flops_over_the_peak(run: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(telemetry, "peak", lambda precision, ranks: 4e12)
    done = run(training={"steps": 2})
    done.go()
    flops = price(done.learner.spec).flops_per_token.training
    for event in done.steps().values():
        scalars = dict(zip(names_of(done), event.scalars.tolist(), strict=True))
        assert scalars["tflop_per_s"] == pytest.approx(flops * scalars["tokens_per_s"] / 1e12, rel=1e-5)
        assert scalars["mfu"] == pytest.approx(scalars["tflop_per_s"] / 4, rel=1e-5)
    assert re.search(r"step 1/2 .* tokens/s  \S+ TFLOP/s \(\d+\.\d% MFU\)", capsys.readouterr().out)


def test_a_dense_run_leaves_the_router_out(run: Start) -> None:
    done = run(model={"moe": None}, training={"steps": 2})
    done.go()
    assert names_of(done) == ["loss", "lm_loss", "grad_norm", "lr", "tokens_per_s", "step_ms", "tflop_per_s"]
    assert {name for event in done.steps().values() for name in event.tensors} == {"phase_ms"}
    assert [event.max_vio_global for event in done.events if isinstance(event, events.EvalDone)] == [None]


def test_the_selection_bias_moves_against_the_load(run: Start) -> None:
    bias = {"kind": "loss_free_bias", "update_rate": 0.25}
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 32, "router": {"kind": "sigmoid_topk"}, "balance": [bias]}
    done = run(model={"moe": moe}, training={"steps": 3})
    done.go()
    steps = done.steps()
    assert not steps[1].tensors["expert_bias"].any()
    for step in (1, 2):
        counts = steps[step].tensors["expert_tokens"].astype(float)
        moved = steps[step + 1].tensors["expert_bias"] - steps[step].tensors["expert_bias"]
        assert np.array_equal(moved, 0.25 * np.sign(counts.mean(axis=1, keepdims=True) - counts))
    assert "balance_loss" not in steps[1].tensors


def test_reports_can_be_rarer(run: Start) -> None:
    done = run(telemetry={"every": 5})
    done.go()
    assert list(done.steps()) == [5, 10, 12]


def test_micro_batches_add_up_to_the_batch(run: Start, tmp_path: Path) -> None:
    whole, split = run(out=tmp_path / "whole"), run(out=tmp_path / "split", training={"grad_accumulation": 4})
    whole.go()
    split.go()
    for step, event in whole.steps().items():
        # The Switch loss is a product of means over the micro-batch; the cross-entropy is the same.
        assert split.steps()[step].scalars[1] == pytest.approx(event.scalars[1], rel=2e-3)
        assert split.steps()[step].tensors["expert_tokens"].sum() == event.tensors["expert_tokens"].sum()


def test_it_learns_and_validates_on_what_it_has_not_seen(run: Start) -> None:
    done = run(training={"steps": 60, "checkpoint_every": 0, "eval_every": 60, "eval_batches": 8}, optimizer={"lr": 0.02, "warmup_steps": 5})
    end = done.go()
    assert losses(done)[1] > 5.3
    assert end.validation_loss < 3.8


def test_bfloat16_follows_float32(run: Start, tmp_path: Path) -> None:
    exact, half = run(out=tmp_path / "f32"), run(out=tmp_path / "bf16", training={"precision": "bfloat16"})
    exact.go()
    half.go()
    assert list(losses(half).values()) == pytest.approx(list(losses(exact).values()), rel=0.02)
    assert losses(half) != losses(exact)
    assert all(parameter.dtype == torch.float32 for parameter in half.learner.model.parameters())


def test_tf32_is_float32_where_there_are_no_tensor_cores(run: Start, tmp_path: Path) -> None:
    exact, rounded = run(out=tmp_path / "f32", training={"steps": 3}), run(out=tmp_path / "tf32", training={"steps": 3, "precision": "tf32"})
    exact.go()
    rounded.go()
    assert losses(rounded) == losses(exact)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_on_fixed_text_has_the_losses_it_always_had(run: Start, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"The square of {n} is {n * n}, its cube is {n**3}.\n"}) for n in range(400)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines))
    data = {"source": "files", "paths": [str(tmp_path / "numbers.jsonl")], "domains": ["code"]}
    done = run(data=data, training={"steps": 8, "eval_every": 0}, optimizer={"lr": 0.01})
    end = done.go()
    assert [*losses(done).values(), end.validation_loss] == pytest.approx(GOLDEN, rel=1e-4)


# ----- interruption changes nothing

NOISY = {"model": {"dropout": 0.1}}


@pytest.mark.parametrize("stop_before", [2, 5, 6, 9])
def test_an_interrupted_run_goes_on_bit_identically(run: Start, tmp_path: Path, stop_before: int) -> None:
    undisturbed = run(out=tmp_path / "undisturbed", **NOISY)
    undisturbed.go()

    first = run(attempt=1, **NOISY)
    with pytest.raises(Stopped):
        first.go(lambda step: setattr(first.requests, "stop", step == stop_before))
    second = run(attempt=2, **NOISY)
    end = second.go()
    assert {**losses(first), **losses(second)} == losses(undisturbed)
    assert list(losses(second)) == list(range(stop_before + 1, 13))
    assert_same_weights(second, undisturbed)
    assert (end.loss, end.validation_loss) == (undisturbed.training.position.loss, undisturbed.training.position.validation_loss)
    start = second.events[0]
    assert isinstance(start, events.RunStarted)
    assert start.resumed_from_step == stop_before
    told = [*read_events(first.out, 1), *read_events(first.out, 2)]
    assert [event.step for event in told if isinstance(event, events.EvalDone)] == [5, 10, 12]


def test_a_crash_goes_back_to_the_last_checkpoint(run: Start, tmp_path: Path) -> None:
    undisturbed = run(out=tmp_path / "undisturbed", **NOISY)
    undisturbed.go()

    def crash(step: int) -> None:
        if step == 7:
            raise RuntimeError("the lights went out")

    with pytest.raises(RuntimeError, match="lights"):
        run(attempt=1, **NOISY).go(crash)
    second = run(attempt=2, **NOISY)
    second.go()
    assert list(losses(second)) == list(range(5, 13))
    assert losses(second) == {step: loss for step, loss in losses(undisturbed).items() if step > 4}
    assert_same_weights(second, undisturbed)


def test_a_damaged_checkpoint_costs_steps_but_not_the_run(run: Start, tmp_path: Path) -> None:
    first = run(attempt=1)
    with pytest.raises(Stopped):
        first.go(lambda step: setattr(first.requests, "stop", step == 10))
    model = first.out / "checkpoints" / "step-00000010" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    model.write_bytes(data)
    second = run(attempt=2)
    second.go()
    assert list(losses(second)) == [9, 10, 11, 12]
    assert {step: losses(second)[step] for step in (9, 10)} == {step: losses(first)[step] for step in (9, 10)}


def test_the_same_spec_twice_is_the_same_run(run: Start, tmp_path: Path) -> None:
    one, other = run(out=tmp_path / "one", **NOISY), run(out=tmp_path / "other", **NOISY)
    one.go()
    other.go()
    assert losses(one) == losses(other)


def test_a_finished_run_has_nothing_left_to_do(run: Start) -> None:
    run().go()
    again = run(attempt=1)
    end = again.go()
    assert end.step == 12
    assert math.isfinite(end.validation_loss)
    assert again.steps() == {}


def test_more_steps_go_on_where_the_run_ended(run: Start) -> None:
    run().go()
    longer = run(attempt=1, training={"steps": 15, "batch_size": 4, "eval_every": 5, "eval_batches": 2, "checkpoint_every": 4})
    longer.go()
    assert list(losses(longer)) == [13, 14, 15]


def test_a_checkpoint_of_another_model_is_refused(run: Start) -> None:
    run().go()
    other = run(attempt=1, model={"d_model": 16})
    with pytest.raises(SpecRefused, match=r"^model: the checkpoint is of another model: size mismatch for"):
        other.go()


def test_starting_over_keeps_the_old_checkpoints_out_of_the_way(run: Start) -> None:
    done = run()
    done.go()
    again = run(attempt=1)
    again.training.start_over()
    again.go()
    assert list(losses(again)) == list(range(1, 13))
    assert losses(again) == losses(done)
    assert [path.name.split("-")[0] for path in done.out.iterdir() if path.name.startswith("checkpoints.")] == ["checkpoints.before"]


# ----- what goes wrong


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run: Start) -> None:
    done = run()

    def poison(step: int) -> None:
        if step == 7:
            with torch.no_grad():
                next(done.learner.model.parameters()).fill_(math.nan)

    with pytest.raises(NotFinite, match=r"^step 7: the loss is nan; the last checkpoint is of step 4$"):
        done.go(poison)
    assert checkpoint.steps(done.out / "checkpoints") == [4]
    assert math.isnan(done.steps()[7].scalars[0])


def test_a_checkpoint_is_written_on_request(run: Start) -> None:
    done = run(training={"checkpoint_every": 0})
    done.go(lambda step: setattr(done.requests, "checkpoints", 1 if step >= 3 else 0))
    assert checkpoint.steps(done.out / "checkpoints") == [3, 12]


def test_a_spike_is_told_with_what_the_router_did(run: Start) -> None:
    done = run(training={"steps": 30, "eval_every": 0, "checkpoint_every": 0}, optimizer={"lr": 1e-3, "warmup_steps": 2})

    def disturb(step: int) -> None:
        with torch.no_grad():  # a head that is 30 times too sure, for one step
            done.learner.model.embedding.weight.mul_({20: 30, 21: 1 / 30}.get(step, 1))

    done.go(disturb)
    spikes = [event for event in done.events if isinstance(event, events.SpikeDetected)]
    assert [spike.step for spike in spikes] == [20]
    spike, steps = spikes[0], done.steps()
    assert spike.loss == pytest.approx(float(steps[20].scalars[0]), rel=1e-6)
    assert spike.median == pytest.approx(float(np.median([steps[step].scalars[0] for step in range(12, 20)])), rel=1e-6)
    assert spike.score > 6
    for row, layer in enumerate(spike.router):
        counts = steps[20].tensors["expert_tokens"][row]
        before = [steps[step].tensors["expert_tokens"][row] for step in range(4, 20)]
        assert layer["layer"] == row
        assert layer["top_expert"] == counts.argmax()
        assert layer["top_share"] == pytest.approx(counts.max() / counts.sum())
        assert layer["max_vio"] == pytest.approx(counts.max() / counts.mean() - 1)
        assert layer["max_vio_before"] == pytest.approx(np.mean([c.max() / c.mean() - 1 for c in before]))
        assert layer["dead"] == (counts == 0).sum()


def test_no_step_waits_for_the_corpus_to_be_built_again(run: Start) -> None:
    run(training={"steps": 1})
    built = {path: path.stat().st_mtime_ns for path in (HOME / "corpus").rglob("*")}
    run(training={"steps": 1})
    assert {path: path.stat().st_mtime_ns for path in (HOME / "corpus").rglob("*")} == built


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_first_step(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    size = price(tiny()).bytes.checkpoint
    free = shutil.disk_usage("/")._replace(free=3 * size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DiskFull, match="must fit"):
        run(attempt=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=3 * size))
    run(attempt=1)


def test_a_run_goes_on_where_the_checkpoints_that_it_has_take_the_room(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    size = price(tiny()).bytes.checkpoint
    run(training={"steps": 8}).go()
    free = shutil.disk_usage("/")._replace(free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert run(attempt=1).go().step == 12, "two checkpoints are there, and the next one makes the oldest go"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=size - 1))
    with pytest.raises(DiskFull, match="and 1 must fit"):
        run(attempt=2)


def test_what_torch_and_the_system_raise_has_a_reason() -> None:
    def too_much() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(RuntimeError) as caught:
        too_much()
    assert classify(caught.value) == (OUT_OF_MEMORY, "oom")
    assert classify(MemoryError()) == (OUT_OF_MEMORY, "oom")
    assert classify(torch.OutOfMemoryError("CUDA out of memory")) == (OUT_OF_MEMORY, "oom")
    assert classify(OSError(errno.ENOSPC, "No space left on device")) == (DISK_FULL, "disk_full")
    assert classify(ValueError("something else")) == (ERROR, "error")
    assert classify(RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:43753: Connection reset by peer")) == (
        PEER_LOST,
        "peer_lost",
    )
    assert classify(RuntimeError("NCCL error: remote process exited, ncclRemoteError")) == (PEER_LOST, "peer_lost")
    assert classify(RuntimeError("NCCL error: invalid usage, ncclInvalidUsage")) == (ERROR, "error")
