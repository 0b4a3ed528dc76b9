"""Two hosts, each with a name and a home of its own, share a directory: one vanishes, and the other goes on, begins and writes from what is there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.end_to_end.chaos.conftest import NOT_OURS, PROJECT, Lab, free_port
from tests.end_to_end.chaos.test_hosts import SMALL


def may_be_named() -> bool:
    """Whether this machine lets a process have a host name of its own."""
    tried = shutil.which("unshare") and subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True)
    return bool(tried) and tried.returncode == 0  # type: ignore[union-attr]


pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.skipif(not may_be_named(), reason="unshare --uts is not permitted")]


class Host:
    """A worker with a host name and a home of its own."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name, self.home = name, Path(tempfile.mkdtemp(prefix=f"{name}-"))
        own_name = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
        with (self.home / "worker.log").open("ab") as log:
            subprocess.Popen(
                [*own_name, sys.executable, "-m", "moelab.cli", "worker"], cwd=PROJECT, stdout=log, stderr=log, start_new_session=True,
                env=environment | {"MOELAB_HOME": str(self.home), "MOELAB_WORKER_NAME": name},
            )  # fmt: skip

    def vanish(self) -> None:
        """Every process of the host dies at once."""
        for _ in range(3):
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if process.environ().get("MOELAB_HOME") == str(self.home):
                        os.kill(process.pid, signal.SIGKILL)


class Shared(Lab):
    """The lab whose hosts share `storage`."""

    storage: Path
    environment: dict[str, str]
    hosts: list[Host]

    def start(self, name: str) -> Host:
        self.hosts.append(Host(name, self.environment))
        return self.hosts[-1]

    def logs(self) -> str:
        paths = [
            path for host in self.hosts for path in [host.home / "worker.log", *host.home.glob("runs/*/attempts/*/*.log"), *host.home.glob("*.log")]
        ]
        return super().logs() + "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


@pytest.fixture
def lab() -> Iterator[Shared]:
    home = Path(tempfile.mkdtemp(prefix="moelab-storage-"))
    home.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name not in NOT_OURS} | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    log = (home / "up.log").open("wb")
    command = [sys.executable, "-m", "moelab.cli", "up", "--no-worker", "--port", str(free_port())]
    up = subprocess.Popen(command, env=env | {"MOELAB_HOME": str(home)}, stdout=log, stderr=log, cwd=PROJECT)
    lab = None
    try:
        deadline = time.monotonic() + 90
        while b"moelab is up" not in (home / "up.log").read_bytes():
            assert up.poll() is None and time.monotonic() < deadline, (home / "up.log").read_text()
            time.sleep(0.1)
        lab = Shared(home, up)
        lab.hosts, lab.storage = [], home / "shared"
        lab.storage.mkdir()
        redis = next(json.loads(path.read_text())["REDIS_URL"] for path in home.glob("*.json") if "REDIS_URL" in path.read_text())
        token = str(lab.client.create_token("hosts", ["worker"])["secret"])
        lab.environment = env | {
            "MOELAB_SERVER": lab.client.server, "MOELAB_TOKEN": token, "REDIS_URL": redis, "MOELAB_CHECKPOINTS": f"file://{lab.storage}/"
        }  # fmt: skip
        yield lab
    finally:
        for host in lab.hosts if lab else []:
            host.vanish()
            shutil.rmtree(host.home, ignore_errors=True)
        up.send_signal(signal.SIGTERM)
        up.wait(40)
        shutil.rmtree(home, ignore_errors=True)


def test_another_host_goes_on_begins_and_writes_from_what_the_lost_one_has_stored(lab: Shared) -> None:
    one = lab.start("lost")
    spec = SMALL | {
        "training.steps": 300,
        "training.checkpoint_every": 20,
        "data.tokenizer": "bpe",
        "data.bpe_vocab_size": 300,
        "model.vocab_size": 300,
    }
    whole, run = (int(lab.client.submit(preset="nano-mixtral", overrides=spec, name=name)["id"]) for name in ("undisturbed", "moved"))
    assert lab.client.wait(whole, timeout_s=150)["state"] == "succeeded"

    def stored() -> list[int]:
        return [row["step"] for row in lab.client.checkpoints(run) if row["stored_at"]]

    lab.wait(lambda: max(stored(), default=0) >= 40, 120)
    one.vanish()
    began = time.monotonic()
    lab.start("other")
    lab.wait(lambda: (found := lab.client.run(run))["attempt"] == 2 and found["state"] in ("running", "succeeded"), 60)  # it may be quick
    print(f"the other host went on after {time.monotonic() - began:.1f} s, from step {lab.client.run(run)['resumed_from_step']}")
    found = lab.client.wait(run, timeout_s=150)
    assert (found["state"], found["worker"]) == ("succeeded", "other") and found["resumed_from_step"] >= 40
    (_, expected), (_, got) = (lab.client.steps(number, points=2000, scalars=["loss", "grad_norm"]) for number in (whole, run))
    np.testing.assert_array_equal(got["step"], np.arange(1, 301))
    np.testing.assert_array_equal(got["scalars"], expected["scalars"])

    # Text from a run that only the lost host has trained, and a run that begins from it.
    text = lab.client.generate(whole, "a,", tokens=4, wait_s=90)
    assert text["state"] == "succeeded" and text["step"] == 300, text
    child = lab.client.submit(preset="nano-mixtral", overrides=spec | {"training.steps": 2, "start.kind": "checkpoint", "start.run": whole})
    ended = lab.client.wait(int(child["id"]), timeout_s=90)
    assert (ended["state"], ended["worker"]) == ("succeeded", "other"), ended["detail"]
    assert not list(lab.hosts[1].home.glob("runs/*/origin")), "it was needed at the start alone"

    # Its weights, on a machine that has neither.
    found = json.loads((lab.home / "client.json").read_text())
    env = lab.environment | {"MOELAB_HOME": str(lab.home / "elsewhere"), "MOELAB_SERVER": found["server"], "MOELAB_TOKEN": found["token"]}
    command = [sys.executable, "-m", "moelab.cli", "export-model", str(whole), "--out", str(lab.home / "model")]
    without = {name: value for name, value in env.items() if name != "MOELAB_CHECKPOINTS"}
    told = subprocess.run(command, env=without, check=False, capture_output=True, text=True, cwd=PROJECT)
    assert told.returncode == 2 and f"MOELAB_CHECKPOINTS=file://{lab.storage}/" not in told.stderr and f"=file://{lab.storage} it is" in told.stderr
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0 and list((lab.home / "model").glob("*.safetensors")), done.stderr
    assert not list((lab.home / "elsewhere").glob("export-*"))
