"""Checkpoints under kills, flipped bits and full disks."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe.train import checkpoint
from moe.train.stop import DISK_FULL, classify

STATE = {"step": 0, "loss": 0.1 + 0.2}


def tensors(step: int, size: int = 100_000) -> dict[str, dict[str, torch.Tensor]]:
    """Contents that say which step they are of."""
    return {
        "model": {"weight": torch.full((size,), float(step)), "bias": torch.arange(7) + step},
        "optimizer": {"exp_avg/weight": torch.full((size,), step / 3), "step/weight": torch.tensor(float(step))},
    }


def save(directory: Path, step: int) -> checkpoint.Saved:
    return checkpoint.save(directory, step, tensors(step), STATE)


def assert_holds(directory: Path, step: int) -> None:
    loaded, state = checkpoint.load(directory, step)
    assert state == STATE
    for file, group in tensors(step).items():
        assert loaded[file].keys() == group.keys()
        assert all(torch.equal(loaded[file][name], value) and loaded[file][name].dtype == value.dtype for name, value in group.items())


def in_child(work: Callable[[], None], kill_after_s: float | None = None, **environment: str) -> int:
    """Runs `work` in a forked process, and kills it after a while if asked; the wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.environ.update(environment)
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = save(tmp_path, 12)
    assert saved.path == tmp_path / "step-00000012"
    assert saved.size_bytes == sum(file.stat().st_size for file in saved.path.iterdir())
    assert checkpoint.newest_whole(tmp_path) == (12, [])
    assert_holds(tmp_path, 12)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_one_flipped_bit_is_found_and_the_checkpoint_before_is_used(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2).path / name
    data = bytearray(damaged.read_bytes())
    data[random.Random(name).randrange(len(data))] ^= 0x10
    damaged.write_bytes(data)
    step, complaints = checkpoint.newest_whole(tmp_path)
    assert step == 1
    assert len(complaints) == 1
    assert "step-00000002" in complaints[0]
    assert_holds(tmp_path, 1)
    assert_holds(tmp_path, save(tmp_path, 2).step)
    assert checkpoint.newest_whole(tmp_path) == (2, [])


@pytest.mark.parametrize("harm", ["truncated", "missing", "added", "renamed"])
def test_other_damage_is_found_too(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2).path
    if harm == "truncated":
        os.truncate(path / "model.safetensors", 1000)
    elif harm == "missing":
        (path / "state.json").unlink()
    elif harm == "added":
        (path / "extra.bin").write_bytes(b"x")
    else:
        path.rename(tmp_path / "step-00000003")
    assert checkpoint.newest_whole(tmp_path)[0] == 1


def test_twenty_kills_while_writing_leave_nothing_unreadable(tmp_path: Path) -> None:
    save(tmp_path, 1)
    started = time.monotonic()
    save(tmp_path, 2)
    one_save_s = time.monotonic() - started

    def write_on() -> None:
        for step in range(checkpoint.steps(tmp_path)[-1] + 1, 10_000):
            checkpoint.prune(tmp_path, 3, save(tmp_path, step))

    noise, interrupted = random.Random(0), 0
    for _ in range(20):
        assert os.WIFSIGNALED(in_child(write_on, kill_after_s=noise.uniform(0.2, 3) * one_save_s))
        interrupted += any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
        step, complaints = checkpoint.newest_whole(tmp_path)
        assert complaints == []
        assert step is not None
        assert_holds(tmp_path, step)
        checkpoint.sweep(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert interrupted >= 5, "the kills must hit the writing"


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("ckpt.after_model", 1),
        ("ckpt.after_files", 1),
        ("ckpt.before_rename", 1),
        ("ckpt.after_rename", 2),
    ],
)
def test_a_crash_at_each_point_leaves_the_old_or_the_new(tmp_path: Path, point: str, newest: int) -> None:
    save(tmp_path, 1)
    status = in_child(lambda: save(tmp_path, 2) and None, MOELAB_CRASH_AT=point)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert checkpoint.newest_whole(tmp_path) == (newest, [])
    assert_holds(tmp_path, newest)


def test_only_dead_writers_are_swept(tmp_path: Path) -> None:
    mine, theirs = tmp_path / f"step-00000002.{os.getppid()}.tmp", tmp_path / "step-00000003.4194999.tmp"
    mine.mkdir()
    theirs.mkdir()
    checkpoint.sweep(tmp_path)
    assert mine.exists()
    assert not theirs.exists()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 9, 100_000_000, 123_456_789):
        saved = save(tmp_path, step)
    for aside in ("step-00000007.damaged", "step-00000008.left"):
        (tmp_path / aside).mkdir()
    assert checkpoint.prune(tmp_path, 2, saved) == [1, 5, 9]
    assert not list(tmp_path.glob("*.*"))
    assert checkpoint.steps(tmp_path) == [100_000_000, 123_456_789]


def test_a_checkpoint_of_fewer_steps_is_not_pruned_as_it_is_written(tmp_path: Path) -> None:
    for step in (7, 8, 9):
        save(tmp_path, step)
    assert checkpoint.prune(tmp_path, 1, save(tmp_path, 3)) == [7, 8]
    assert checkpoint.steps(tmp_path) == [3, 9]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_says_so_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1500k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    try:
        save(disk, 1)
        with pytest.raises(Exception) as caught:
            save(disk, 2)
        assert classify(caught.value) == (DISK_FULL, "disk_full")
        assert checkpoint.newest_whole(disk) == (1, [])
        assert [path.name for path in disk.iterdir()] == ["step-00000001"]
    finally:
        os.system(f"umount {disk}")


def test_state_is_plain_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1).path
    assert json.loads((path / "state.json").read_text()) == STATE
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
