"""Devices, slots, and who holds an attempt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.conftest import PROJECT
from workers import devices, host, look_for_work

NVIDIA_SMI = """#!/bin/sh
echo "0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559"
echo "1, GPU-bbbb, NVIDIA H100 80GB HBM3, 81559"
echo "2, GPU-cccc, NVIDIA L4, 23034"
"""


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that answers as the real one does."""
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("MOELAB_SLOTS", raising=False)


def test_cuda_devices_are_listed_without_torch(three_gpus: None) -> None:
    found = devices.devices()
    assert [devices.label(device) for device in found] == ["cuda:0", "cuda:1", "cuda:2", "cpu:0", "cpu:1", "cpu:2"]
    assert found[0]["memory_bytes"] == 81559 * 2**20
    assert devices.slots(found) == 3
    assert (devices.for_torch("cuda:1"), devices.for_torch("cpu:2")) == ("cuda:1", "cpu")


@pytest.mark.parametrize(
    ("visible", "names"),
    [("2,0", ["NVIDIA L4", "NVIDIA H100 80GB HBM3"]), ("GPU-cc", ["NVIDIA L4"]), ("", []), ("0,7,1", ["NVIDIA H100 80GB HBM3"])],
)
def test_cuda_visible_devices_is_obeyed_and_counted_as_torch_counts(
    three_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cuda = [device for device in devices.devices() if device["kind"] == "cuda"]
    assert [device["name"] for device in cuda] == names
    assert [device["index"] for device in cuda] == list(range(len(names)))


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "100000"])
def test_slots_that_make_no_sense_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MOELAB_SLOTS", text)
    with pytest.raises(ValueError, match="MOELAB_SLOTS"):
        devices.slots([])


def hold(home: Path, run: int, taken: list[str]) -> host.AttemptLock:
    lock = host.AttemptLock(home / "runs" / str(run) / "attempts" / "1")
    lock.write(host.Holder(run, 1, host.identity(os.getpid()), taken))
    return lock


def test_what_is_free_is_what_no_living_attempt_holds(tmp_path: Path, three_gpus: None) -> None:
    found = devices.devices()
    first = hold(tmp_path, 1, ["cuda:1"])
    shipping = hold(tmp_path, 2, [])
    assert look_for_work.free_devices(found, 3, tmp_path) == (2, ["cuda:0", "cuda:2", "cpu:0", "cpu:1"])
    assert look_for_work.free_devices(found, 1, tmp_path) is None
    assert sorted(host.running_supervisors(tmp_path)) == [os.getpid(), os.getpid()]
    os.close(first.fd)
    os.close(shipping.fd)
    assert host.living(tmp_path) == []
    assert look_for_work.free_devices(found, 1, tmp_path) == (1, ["cuda:0", "cuda:1", "cuda:2", "cpu:0"])


def test_one_attempt_has_one_holder(tmp_path: Path) -> None:
    lock = hold(tmp_path, 1, ["cpu:0"])
    with pytest.raises(host.LockedError):
        host.AttemptLock(lock.path.parent)
    os.close(lock.fd)
    os.close(host.AttemptLock(lock.path.parent).fd)


def test_a_rank_that_outlives_its_supervisor_still_holds_the_attempt(tmp_path: Path) -> None:
    lock = hold(tmp_path, 1, ["cpu:0"])
    rank = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fd,))
    lock.write(host.Holder(1, 1, (2**22 + 1, 0.0), ["cpu:0"], [host.identity(rank.pid)]))
    os.close(lock.fd)
    assert [holder.run for holder in host.living(tmp_path)] == [1]
    assert host.running_supervisors(tmp_path) == []
    assert host.end_attempt(lock.path, timeout_s=5)
    assert rank.wait(5) == -9


def test_a_reused_process_id_is_not_taken_for_the_old_process(tmp_path: Path) -> None:
    holder = host.Holder(1, 1, (os.getpid(), 12345.0), [], [(os.getpid(), 1.0)])
    assert list(holder.processes()) == []


def test_the_celery_process_loads_neither_torch_nor_the_server() -> None:
    heavy = {"torch", "triton", "django.db", "django.apps", "experiments", "moelab.settings"}
    code = f"import sys, workers.app, workers.supervisor; workers.app.app.finalize(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=60)
    assert done.stdout == "[]\n", done.stderr
