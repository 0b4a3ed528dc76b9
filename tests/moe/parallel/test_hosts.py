"""Ranks of one run on two hosts: each has a directory of its own, and they meet at an address. The hosts are processes of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe.train import checkpoint, corpus, handing, stop
from moe.train.ranks import Ranks
from spec.experiment import ExperimentSpec
from tests.moe.parallel.ranks import on_ranks
from tests.moe.parallel.test_training import HALF, TOLERANCE, WHOLE, spec
from tests.moe.train.test_process import finish, start, steps, wait_until
from tests.moe.train.tiny import tiny


def on_two_hosts(made: ExperimentSpec, hosts: list[Path], attempt: int = 0, **environment: str) -> list[subprocess.Popen[str]]:
    """Rank 0 in the first directory, which inherits the open port, and rank 1 in the second."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        place = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MOELAB_RENDEZVOUS": place, "GLOO_SOCKET_IFNAME": "lo"} | environment
        ranks = []
        for rank, out in enumerate(hosts):
            fd = {"MOELAB_RENDEZVOUS_FD": str(listener.fileno())} if rank == 0 else {}
            ranks.append(start_with_fd(made, out, attempt, listener.fileno(), RANK=str(rank), **shared, **fd))
    return ranks


def start_with_fd(made: ExperimentSpec, out: Path, attempt: int, fd: int, **environment: str) -> subprocess.Popen[str]:
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.json").write_text(made.model_dump_json())
    command = [sys.executable, "-m", "moe.train", str(out / "spec.json"), "--out", str(out), "--attempt", str(attempt)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=(fd,))


def all_finished(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        code, output = finish(rank)
        assert code == stop.FINISHED, output


def handed(directory: str) -> tuple[Any, Any, str, str]:
    """On each rank: what is loaded of a checkpoint of each rank's own, and of one that both have; and what is said of two corpora."""
    ranks = Ranks(dist.get_rank(), 2, torch.device("cpu"))
    own, equal = Path(directory) / str(ranks.rank), Path(directory) / f"equal-{ranks.rank}"
    for place, value in ((own, ranks.rank), (equal, 5)):
        group = {
            "a": torch.full((2, 3), value, dtype=torch.bfloat16),
            "none": torch.empty(0, 4),
            "step": torch.tensor(value),
            "odd": torch.tensor([True]),
        }
        checkpoint.save(place, 7, {"model": group, "optimizer": {"m": torch.arange(5.0) + value}}, {"who": value, "loss": None})
    loaded = handing.load_checkpoint(ranks, own, 7), handing.load_checkpoint(ranks, equal, 7)
    tokens = np.arange(100, dtype=np.uint16)
    return *map(_plain, loaded), *(_complaint(ranks, [corpus.Domain("d", tokens, tokens[:number])]) for number in (50, 50 + ranks.rank))


def _plain(loaded: tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]) -> Any:
    tensors, state = loaded
    return {name: (str(one.dtype), list(one.shape), one.tolist()) for group in tensors.values() for name, one in group.items()}, state


def _complaint(ranks: Ranks, domains: list[corpus.Domain]) -> str:
    try:
        handing.check_corpus(ranks, domains)
    except stop.SpecRefused as error:
        return str(error)
    return ""


def test_the_first_ranks_checkpoint_is_everybodys_and_one_corpus_too(tmp_path: Path) -> None:
    for other_than_first, same, no_complaint, complaint in on_ranks(2, tmp_path / "ranks", handed, str(tmp_path)):
        for (tensors, state), value in ((other_than_first, 0), (same, 5)):
            assert state == {"who": value, "loss": None}
            assert tensors["a"] == ("torch.bfloat16", [2, 3], [[value] * 3] * 2)
            assert tensors["none"] == ("torch.float32", [0, 4], []) and tensors["step"] == ("torch.int64", [], value)
            assert tensors["odd"] == ("torch.bool", [1], [True])
            assert tensors["m"] == ("torch.float32", [5], [value + index for index in range(5)])
        assert no_complaint == "" and complaint.startswith("data: the hosts of this run do not have the same texts")


@pytest.mark.slow
def test_a_checkpoint_of_the_first_host_goes_on_on_both_whatever_the_second_one_has(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    code, output = finish(start(spec(1, 1, WHOLE), alone))
    assert code == stop.FINISHED, output
    hosts = [tmp_path / "first", tmp_path / "second"]
    all_finished(on_two_hosts(spec(1, 2, HALF), hosts))
    assert checkpoint.steps(hosts[0] / "checkpoints") == [HALF]
    assert checkpoint.steps(hosts[1] / "checkpoints") == []
    (hosts[1] / "checkpoints" / f"step-{HALF:08d}").mkdir(parents=True)  # of another attempt, when this host was the first
    (hosts[1] / "checkpoints" / f"step-{HALF:08d}" / checkpoint.MANIFEST).write_text("{}")
    all_finished(on_two_hosts(spec(1, 2, WHOLE), hosts, attempt=1))
    expected, made = steps(alone), steps(hosts[0], 1)
    assert list(made) == list(range(HALF + 1, WHOLE + 1))
    for step, one in made.items():
        assert one.scalars[:4] == pytest.approx(expected[step].scalars[:4], rel=TOLERANCE), f"losses and gradient norm of step {step}"


@pytest.mark.slow
def test_weights_that_only_the_first_host_has_begin_the_run_on_both(tmp_path: Path) -> None:
    source = tmp_path / "source"
    code, output = finish(start(tiny(training={"steps": 3}), source))
    assert code == stop.FINISHED, output
    begun = tiny(training={"steps": 3}, start={"kind": "checkpoint", "path": str(source)}, parallel={"data": 2})
    hosts = [tmp_path / "first", tmp_path / "second"]
    alone = tmp_path / "alone"
    code, output = finish(start(tiny(training={"steps": 3}, start={"kind": "checkpoint", "path": str(source)}), alone))
    assert code == stop.FINISHED, output
    first = on_two_hosts(begun, hosts, MOELAB_DATA_ROOTS=str(source))
    all_finished(first)
    for step, one in steps(hosts[0]).items():
        assert one.scalars[1] == pytest.approx(steps(alone)[step].scalars[1], rel=1e-4), f"loss of step {step}"


def test_the_survivor_of_a_killed_host_says_that_a_peer_is_lost(tmp_path: Path) -> None:
    hosts = [tmp_path / "first", tmp_path / "second"]
    ranks = on_two_hosts(tiny(training={"steps": 20_000, "eval_every": 0, "checkpoint_every": 0}, parallel={"data": 2}), hosts)
    wait_until(lambda: (hosts[0] / "attempts/0/events.spool").exists() and len(steps(hosts[0])) > 3)
    ranks[1].send_signal(signal.SIGKILL)
    code, output = finish(ranks[0])
    assert code == stop.PEER_LOST, output
    assert output.splitlines()[-1].startswith("peer_lost: ")
    finish(ranks[1])


@pytest.mark.slow
def test_torchrun_by_hand(tmp_path: Path) -> None:
    """The nodes of one run, each by its own torchrun, as without a server."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    made, agents = tiny(training={"steps": 3}, parallel={"data": 2, "nodes": 2}), []
    for node in range(2):
        out = tmp_path / str(node)
        out.mkdir()
        (out / "spec.json").write_text(made.model_dump_json())
        torchrun = ["torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr", "127.0.0.1"]
        trainer = ["--master-port", str(port), "-m", "moe.train", str(out / "spec.json"), "--out", str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", *torchrun, *trainer]
        agents.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    all_finished(agents)
    assert list(steps(tmp_path / "0")) == [1, 2, 3]
