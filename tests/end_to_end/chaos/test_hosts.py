"""One run on several hosts, each with a network, a host name and a home of its own: they train together, one vanishes, the run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.end_to_end.chaos.conftest import NOT_OURS, PROJECT, Lab, free_port

SMALL = {
    "parallel.threads": 1, "training.checkpoint_every": 10, "training.eval_every": 0,
    "training.batch_size": 4, "data.seq_len": 64, "data.domains": ["tables"], "model.n_layers": 2, "model.d_model": 64,
    "model.moe.d_expert": 64, "model.d_ff": 128,
}  # fmt: skip
TWO_HOSTS = SMALL | {"parallel.data": 2, "parallel.nodes": 2}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine does not allow hosts of its own; "" where it does."""
    if not all(shutil.which(tool) for tool in ("ip", "nsenter", "unshare")):
        return "iproute2 and util-linux are needed to make hosts"
    name = f"mlt{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"
    return ""


ESTABLISHED = "01"
MAX_HOSTS = 3
NO_HOSTS = why_not()
pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS), pytest.mark.timeout(400)]


class TrainingHost:
    """A network namespace with one address on the bridge, a host name, a home, and a worker."""

    def __init__(self, name: str, number: int, bridge: str, subnet: str, environment: dict[str, str]) -> None:
        self.name, self.address = name, f"{subnet}.{number + 1}"
        self.home = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self._link = f"{name}o"
        self.environment = environment | {"MOELAB_HOME": str(self.home), "MOELAB_WORKER_NAME": name}
        ip("netns", "add", name)
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", self._link, "master", bridge, "up")
        for command in (["link", "set", "lo", "up"], ["link", "set", "eth0", "up"], ["addr", "add", f"{self.address}/24", "dev", "eth0"]):
            ip("-n", name, *command)

    def start_worker(self, **more: str) -> None:
        """Starts the host's worker, with `more` in its environment, unless it lives."""
        if any("moelab.cli" in process.cmdline() for process in self.processes()):
            return
        own_name = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        command = ["nsenter", f"--net=/run/netns/{self.name}", *own_name, sys.executable, "-m", "moelab.cli", "worker"]
        with (self.home / "worker.log").open("ab") as log:
            subprocess.Popen(command, env=self.environment | more, stdout=log, stderr=log, cwd=PROJECT, start_new_session=True)

    def processes(self) -> list[psutil.Process]:
        """Everything alive on this host."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MOELAB_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "moe.train" in process.cmdline():
                    found.append(process)
        return found

    def peers(self) -> set[str]:
        """The addresses to which this host's rank has connections, but for its own."""
        (trainer,) = self.trainers()
        rows = [line.split() for line in Path(f"/proc/{trainer.pid}/net/tcp").read_text().splitlines()[1:]]
        remote = {socket.inet_ntoa(int(row[2].partition(":")[0], 16).to_bytes(4, sys.byteorder)) for row in rows if row[3] == ESTABLISHED}
        return remote - {self.address, "127.0.0.1"}

    def vanish(self) -> None:
        """Every process of the host dies at once."""
        for _ in range(3):
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    os.kill(process.pid, signal.SIGKILL)

    def unplug(self) -> None:
        ip("link", "set", self._link, "down")

    def plug_in(self) -> None:
        ip("link", "set", self._link, "up")

    def cut_off(self, address: str) -> None:
        """What this host sends to `address` arrives nowhere, and nobody is told."""
        ip("-n", self.name, "neigh", "replace", address, "lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent")

    def find_again(self, address: str) -> None:
        ip("-n", self.name, "neigh", "del", address, "dev", "eth0")

    def remove(self) -> None:
        self.vanish()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self._link], check=False, capture_output=True)
        shutil.rmtree(self.home, ignore_errors=True)


class Network(Lab):
    """The lab whose hosts are elsewhere."""

    hosts: list[TrainingHost]
    server_address: str

    def logs(self) -> str:
        paths = [path for host in self.hosts for path in [host.home / "worker.log", *host.home.glob("runs/*/attempts/*/*.log")]]
        paths += [path for host in self.hosts for path in host.home.glob("runs/*/attempts/*/log.txt")]
        return super().logs() + "\n".join(f"== {path}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)

    def start(self, count: int) -> list[TrainingHost]:
        """The first `count` hosts, with a worker on each, and none on the others."""
        for host in self.hosts[count:]:
            host.vanish()
        for host in self.hosts[:count]:
            host.start_worker()
        return self.hosts[:count]

    def submit_on_hosts(self, name: str, overrides: dict[str, Any]) -> int:
        return int(self.client.submit(preset="nano-mixtral", overrides=overrides, name=name)["id"])

    def in_order(self, run_id: int) -> list[TrainingHost]:
        """The run's hosts, node 0 first."""
        by_name = {host.name: host for host in self.hosts}
        return [by_name[node["worker"]] for node in self.run(run_id)["nodes"]]

    def run(self, run_id: int) -> dict[str, Any]:
        return dict(self.client.run(run_id))

    def ends(self, run_id: int, attempt: int) -> list[dict[str, Any]]:
        """How each host of the attempt ended."""
        return [node for node in self.client.http.request("GET", f"/runs/{run_id}/nodes").json()["items"] if node["attempt"] == attempt]

    def transitions(self, run_id: int) -> list[tuple[str, str, str]]:
        return [(row["to_state"], row["reason"], row["detail"]) for row in self.client.transitions(run_id)]


@pytest.fixture(scope="module")
def lab() -> Iterator[Network]:
    bridge, subnet = f"mlbr{os.getpid()}"[:15], f"10.77.{os.getpid() % 250}"
    home = Path(tempfile.mkdtemp(prefix="moelab-hosts-"))
    home.chmod(0o755)
    ip("link", "add", bridge, "type", "bridge")
    up, hosts = None, []
    try:
        ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        env = {name: value for name, value in os.environ.items() if name not in NOT_OURS} | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        log = (home / "up.log").open("wb")
        command = [sys.executable, "-m", "moelab.cli", "up", "--no-worker", "--host", f"{subnet}.1", "--allow-remote", "--port", str(free_port())]
        up = subprocess.Popen(command, env=env | {"MOELAB_HOME": str(home)}, stdout=log, stderr=log, cwd=PROJECT)
        deadline = time.monotonic() + 60
        while b"moelab is up" not in (home / "up.log").read_bytes():
            assert up.poll() is None and time.monotonic() < deadline, (home / "up.log").read_text()
            time.sleep(0.1)
        lab = Network(home, up)
        redis = next(json.loads(path.read_text())["REDIS_URL"] for path in home.glob("*.json") if "REDIS_URL" in path.read_text())
        token = str(lab.client.create_token("hosts", ["worker"])["secret"])
        env |= {"MOELAB_SERVER": lab.client.server, "MOELAB_TOKEN": token, "REDIS_URL": redis}
        hosts += [TrainingHost(f"ml{os.getpid()}h{number}", number, bridge, subnet, env) for number in range(1, MAX_HOSTS + 1)]
        lab.hosts, lab.server_address = hosts, f"{subnet}.1"
        yield lab
    finally:
        for host in hosts:
            host.remove()
        if up is not None:
            up.send_signal(signal.SIGTERM)
            up.wait(40)
        ip("link", "del", bridge)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_is_left(lab: Network) -> Iterator[None]:
    """What a test leaves in training must not keep the hosts from the next one."""
    yield
    for run in lab.client.runs():
        if run["state"] not in ("succeeded", "failed", "cancelled"):
            lab.client.cancel(run["id"])
            lab.client.wait(run["id"], timeout_s=60)


def test_two_hosts_train_one_run_and_it_survives_the_loss_of_either(lab: Network) -> None:
    one, two = *lab.start(1), lab.hosts[1]
    run_id = lab.submit_on_hosts("two hosts", TWO_HOSTS | {"training.steps": 4000})
    lab.wait(lambda: lab.client.http.request("GET", "/workers").json()["items"], 40)
    time.sleep(2)
    assert lab.run(run_id)["state"] == "queued", "half of its hosts are not enough"
    two.start_worker()
    lab.wait_for_step(run_id, 30, 120)
    run = lab.run(run_id)
    assert run["attempt"] == 1
    assert sorted(node["worker"] for node in run["nodes"]) == [one.name, two.name]
    first, other = lab.in_order(run_id)
    assert [len(host.trainers()) for host in (first, other)] == [1, 1]
    assert [host.peers() - {lab.server_address} for host in (first, other)] == [{other.address}, {first.address}], "they talk to each other"

    # A host vanishes with all that runs on it.
    other.vanish()
    began = time.monotonic()
    lab.wait(lambda: lab.run(run_id)["state"] == "queued", 60)
    seconds = time.monotonic() - began
    print(f"the loss of a host was noticed after {seconds:.1f} s")
    assert ("queued", "worker_lost", f"node 1 on {other.name} was not heard from for its whole lease") in lab.transitions(run_id)
    lab.wait(lambda: not first.trainers(), 5)
    reached = lab.last_step(run_id)
    other.start_worker()
    lab.wait_for_step(run_id, reached + 30, 150)
    run = lab.run(run_id)
    assert (run["attempt"], run["nodes"][0]["worker"]) == (2, first.name), "the host with the checkpoint is the first one again"
    assert run["resumed_from_step"] > 0 and reached - run["resumed_from_step"] < 200

    # The network of the first host goes away: nobody tells anybody anything.
    first.unplug()
    lab.wait(lambda: lab.run(run_id)["state"] == "queued", 60)
    lab.wait(lambda: not other.trainers(), 10)
    assert ("queued", "worker_lost", f"attempt 2 on {first.name} was not heard from for its whole lease") in lab.transitions(run_id)
    first.plug_in()
    lab.wait(lambda: lab.run(run_id)["attempt"] >= 3 and lab.run(run_id)["state"] == "running", 150)
    run = lab.run(run_id)
    assert run["nodes"][0]["worker"] == first.name and run["resumed_from_step"] > 0

    # A checkpoint on request, then the end: both hosts stop together, and each step was stored once.
    lab.wait_for_step(run_id, run["resumed_from_step"] + 20, 60)
    lab.client.pause(run_id)
    lab.wait(lambda: lab.run(run_id)["state"] == "paused", 30)
    lab.wait(lambda: not one.trainers() and not two.trainers(), 10)
    stored = lab.client.http.request("GET", f"/runs/{run_id}/metrics/loss?exact=1").json()
    assert stored["steps"] == list(range(1, lab.last_step(run_id) + 1))
    lab.client.cancel(run_id)


def test_a_killed_rank_ends_the_attempt_on_both_hosts_with_its_own_reason(lab: Network) -> None:
    lab.start(2)
    run_id = lab.submit_on_hosts("rank killed", TWO_HOSTS | {"training.steps": 4000})
    lab.wait_for_step(run_id, 15, 120)
    _, other = lab.in_order(run_id)
    (rank,) = other.trainers()
    os.kill(rank.pid, signal.SIGKILL)
    lab.wait(lambda: lab.run(run_id)["attempt"] == 2 and lab.run(run_id)["state"] == "running", 90)
    assert ("queued", "rank_killed", "rank 1 was ended by SIGKILL") in lab.transitions(run_id)
    assert [node["signal"] for node in lab.ends(run_id, attempt=1)][1] == signal.SIGKILL
    lab.client.cancel(run_id)
    assert lab.client.wait(run_id, timeout_s=30)["state"] == "cancelled"
    lab.wait(lambda: not any(host.trainers() for host in lab.hosts), 10)


def test_a_hang_leaves_the_stacks_of_the_ranks_of_every_host(lab: Network) -> None:
    hosts = lab.hosts[:2]
    for host in hosts:
        host.vanish()
        host.start_worker(MOELAB_STEP_TIMEOUT_S="5")
    run_id = lab.submit_on_hosts("hang", TWO_HOSTS | {"training.steps": 100_000})
    lab.wait_for_step(run_id, 15, 120)
    try:
        for host, other in (hosts, hosts[::-1]):
            host.cut_off(other.address)
        began = time.monotonic()
        lab.wait(lambda: any(reason == "hang" for _, reason, _ in lab.transitions(run_id)), 90)
        print(f"a hang was ended after {time.monotonic() - began:.1f} s")
        lab.client.cancel(run_id)
        lab.wait(lambda: all(node["log_tail"] for node in lab.ends(run_id, attempt=1)), 15)
        for node in lab.ends(run_id, attempt=1):
            assert (node["outcome"], node["reason"]) == ("failed", "hang"), node
            stack = [line for line in node["log_tail"].splitlines() if line.startswith(f"[{node['rank']}]")]
            assert any("Current thread" in line for line in stack) and any("distributed_c10d.py" in line for line in stack), node["log_tail"]
    finally:
        for host, other in (hosts, hosts[::-1]):
            host.find_again(other.address)
            host.vanish()


def test_a_run_on_two_hosts_has_the_losses_of_one_on_one(lab: Network) -> None:
    lab.start(2)
    overrides = TWO_HOSTS | {"training.steps": 40}
    wide = lab.submit_on_hosts("wide", overrides)
    assert lab.client.wait(wide, timeout_s=120)["state"] == "succeeded"
    narrow = lab.submit_on_hosts("narrow", overrides | {"parallel.nodes": 1})
    assert lab.client.wait(narrow, timeout_s=120)["state"] == "succeeded"
    np.testing.assert_array_equal(lab.steps(wide).arrays["step"], np.arange(1, 41))
    np.testing.assert_array_equal(lab.steps(wide).arrays["scalars"][:, :4], lab.steps(narrow).arrays["scalars"][:, :4])
    assert "[0] " in lab.client.http.request("GET", f"/runs/{wide}/logs").text


def test_what_is_asked_over_rest_reaches_both_hosts(lab: Network) -> None:
    """Nothing is saved but on request: checkpoint now, pause, resume, and cancel, at a step and before the first one."""
    lab.start(2)
    run_id = lab.submit_on_hosts("asked", TWO_HOSTS | {"training.steps": 100_000, "training.checkpoint_every": 100_000})
    lab.wait_for_step(run_id, 10, 120)
    first, other = lab.in_order(run_id)
    pids = [host.trainers()[0].pid for host in (first, other)]
    for count in (1, 2):
        lab.client.checkpoint(run_id)
        lab.wait(lambda count=count: len(lab.client.checkpoints(run_id)) == count, 10)
    lab.wait_for_step(run_id, lab.last_step(run_id) + 10)
    assert len(lab.client.checkpoints(run_id)) == 2, "one for each request"
    assert [host.trainers()[0].pid for host in (first, other)] == pids, "and it went on"
    assert [len(list(host.home.glob(f"runs/{run_id}/checkpoints/step-*"))) for host in (first, other)] == [2, 0]

    began = time.monotonic()
    lab.client.pause(run_id)
    lab.wait(lambda: lab.run(run_id)["state"] == "paused", 12)
    print(f"paused after {time.monotonic() - began:.1f} s")
    lab.wait(lambda: not first.trainers() and not other.trainers(), 5)
    paused = lab.run(run_id)
    assert max(row["step"] for row in lab.client.checkpoints(run_id)) == paused["last_step"], "nothing is done twice"

    began = time.monotonic()
    lab.client.resume(run_id)
    lab.wait(lambda: lab.run(run_id)["resumed_from_step"] == paused["last_step"], 40)
    print(f"resumed after {time.monotonic() - began:.1f} s")
    lab.wait_for_step(run_id, paused["last_step"] + 10)
    assert lab.run(run_id)["attempt"] == 2 and lab.in_order(run_id) == [first, other]

    lab.client.pause(run_id)
    lab.client.resume(run_id)  # some of the hosts may have heard of the pause, and some not
    lab.wait_for_step(run_id, lab.last_step(run_id) + 10)
    assert lab.run(run_id)["state"] == "running"

    began = time.monotonic()
    lab.client.cancel(run_id)
    assert lab.client.wait(run_id, timeout_s=15)["state"] == "cancelled"
    print(f"cancelled after {time.monotonic() - began:.1f} s")
    lab.wait(lambda: not first.trainers() and not other.trainers(), 5)

    for verb, state in (("pause", "paused"), ("cancel", "cancelled")):
        early = lab.submit_on_hosts(f"{verb} before the first step", TWO_HOSTS | {"training.steps": 100_000})
        lab.wait(lambda early=early: lab.run(early)["state"] == "starting", 30)
        getattr(lab.client, verb)(early)
        lab.wait(lambda early=early, state=state: lab.run(early)["state"] == state, 30)
        lab.wait(lambda: not first.trainers() and not other.trainers(), 5)
        if verb == "pause":
            lab.client.cancel(early)


@pytest.mark.parametrize("parallel", [{"parallel.data": 3}, {"parallel.expert": 3, "model.moe.n_experts": 6}], ids=["data", "experts"])
def test_three_hosts_train_one_run(lab: Network, parallel: dict[str, int]) -> None:
    hosts = lab.start(3)
    overrides = SMALL | {"parallel.nodes": 3, "training.batch_size": 6, "training.steps": 40} | parallel
    run_id = lab.submit_on_hosts("three hosts", overrides)
    lab.wait_for_step(run_id, 3, 120)
    assert set(lab.in_order(run_id)) == set(hosts)
    assert lab.client.wait(run_id, timeout_s=60)["state"] == "succeeded"
    np.testing.assert_array_equal(lab.steps(run_id).arrays["step"], np.arange(1, 41))
    log = lab.client.http.request("GET", f"/runs/{run_id}/logs").text
    assert all(f"[{rank}] " in log for rank in range(3))


def test_with_a_storage_the_first_host_need_not_be_the_one_that_saved_the_checkpoint(lab: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = lab.home / "shared"
    shared.mkdir()
    for host in lab.hosts:
        host.vanish()
        monkeypatch.setitem(host.environment, "MOELAB_CHECKPOINTS", f"file://{shared}")
    lab.start(2)
    run_id = lab.submit_on_hosts("storage", TWO_HOSTS | {"training.steps": 4000, "training.checkpoint_every": 50})
    lab.wait(lambda: any(row["stored_at"] for row in lab.client.checkpoints(run_id)), 150)
    first, other = lab.in_order(run_id)
    first.vanish()
    began = time.monotonic()
    other.start_worker()
    lab.hosts[2].start_worker()
    lab.wait(lambda: lab.run(run_id)["attempt"] == 2 and lab.run(run_id)["state"] == "running", 150)
    run = lab.run(run_id)
    print(f"two others went on after {time.monotonic() - began:.1f} s, from step {run['resumed_from_step']}")
    assert {node["worker"] for node in run["nodes"]} == {other.name, lab.hosts[2].name} and run["resumed_from_step"] >= 50
    lab.wait_for_step(run_id, run["resumed_from_step"] + 10, 60)
    lab.client.cancel(run_id)
    lab.client.wait(run_id, timeout_s=60)
    for host in lab.hosts:
        host.vanish()
