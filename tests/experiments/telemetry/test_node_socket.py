"""What the hosts of one run tell the server, and each other through it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.utils import timezone

from experiments import secret
from experiments.actions.attempt import end_attempt
from experiments.actions.claim import claim
from experiments.models import Node, Run, State, Worker
from experiments.telemetry import log
from spec.events import RunEnded
from tests.experiments.engine import people
from tests.experiments.telemetry.conftest import declared, events_frame, started, step
from tests.experiments.telemetry.sockets import accepted, bearer, said, socket, until

ONE, TWO = bearer("token of one"), bearer("token of two")


@pytest.fixture(autouse=True)
def _valkey(valkey_url: str) -> None:
    """These tests have one."""


@pytest.fixture
def run(transactional_db: None) -> Run:
    """A run on two hosts that has just been granted."""
    made = people.queued(parallel={"data": 2, "nodes": 2})
    workers = [people.worker(name) for name in ("one", "two")]
    for worker in (*workers, workers[0]):
        claim(Run.objects.all(), worker=worker, free_slots=1, free_devices=["cpu:0"])
    Run.objects.filter(pk=made.pk).update(attempt_token_sha256s=[secret.digest("token of one")])
    Node.objects.filter(run=made, rank=1).update(token_sha256=secret.digest("token of two"))
    return Run.objects.get(pk=made.pk)


def path(run: Run, node: int = 0) -> str:
    return f"/ws/ingest/{run.pk}/?attempt=1" + (f"&node={node}" if node else "")


def hosts(message: dict[str, Any]) -> tuple[str, Any]:
    return message["hosts"]["rendezvous"], message["hosts"]["lost"]


async def test_node_0_says_where_and_the_other_hears_it_and_says_why_it_went(run: Run) -> None:
    async with socket(path(run), ONE) as first, socket(path(run, 1), TWO) as second:
        assert hosts(await said(first)) == ("", None)
        hello = await said(second)
        assert (hello["acked"], hello["log_offset"], hosts(hello)) == ({}, 0, ("", None))
        first.send('{"type":"rendezvous","at":"10.0.0.1:4711"}')
        await until(first, "command")
        assert hosts(await until(second, "command")) == ("10.0.0.1:4711", None)
        second.send(json.dumps({"type": "left", "outcome": "failed", "reason": "rank_killed", "detail": "rank 1 was ended by SIGKILL"}))
        await until(second, "fenced")
        _, lost = hosts(await until(first, "command"))
        assert lost == {"reason": "rank_killed", "detail": "rank 1 was ended by SIGKILL"}
    await run.arefresh_from_db()
    assert run.state == State.STARTING, "the attempt is node 0's to end"
    async with socket(path(run, 1), TWO) as second:
        assert (await said(second))["type"] == "fenced"


async def test_each_host_renews_its_own_lease(run: Run) -> None:
    await Node.objects.filter(run=run).aupdate(lease_until=timezone.now())
    before = await Run.objects.aget(pk=run.pk)
    async with socket(path(run, 1), TWO) as second:
        await said(second)
        second.send('{"type":"heartbeat"}')
        await until(second, "command")
    node = await Node.objects.aget(run=run, rank=1)
    after = await Run.objects.aget(pk=run.pk)
    assert (node.lease_until - timezone.now()).total_seconds() > 10
    assert after.lease_until == before.lease_until


async def test_a_host_hears_what_is_wanted_and_that_it_is_over(run: Run) -> None:
    async with socket(path(run, 1), TWO) as second:
        assert (await said(second))["desired"] == "run"
        await Run.objects.filter(pk=run.pk).aupdate(desired="cancel", state=State.STOPPING)
        assert (await until(second, "command"))["desired"] == "cancel"
        await Run.objects.filter(pk=run.pk).aupdate(state=State.CANCELLED)
        await until(second, "fenced")


async def test_a_hang_that_node_0_sees_reaches_the_other(run: Run) -> None:
    async with socket(path(run), ONE) as first, socket(path(run, 1), TWO) as second:
        assert (await said(first))["hosts"]["hanging"] is False
        await said(second)
        first.send('{"type":"hanging"}')
        assert (await until(first, "command"))["hosts"]["hanging"] is True
        assert (await until(second, "command"))["hosts"]["hanging"] is True


async def test_a_fenced_host_says_its_last_word_once_behind_its_log(run: Run) -> None:
    async with socket(f"{path(run, 1)}&last_word=1", TWO) as second:
        assert await said(second) == {"type": "fenced", "noted": False}, "it can still say it as usual"
    await sync_to_async(end_attempt)(run.pk, 1, RunEnded(at=1.0, outcome="failed", reason="hang"))
    async with socket(path(run, 1), TWO) as second:
        assert await said(second) == {"type": "fenced", "noted": False}
    async with socket(f"{path(run, 1)}&last_word=1", TWO) as second:
        hello = await said(second)
        assert (hello["type"], hello["log_offset"]) == ("hello", 0)
        second.send(b"L" + (0).to_bytes(8, "little") + b"[1] stack\n")
        assert await until(second, "log_ack") == {"type": "log_ack", "offset": 10}
        second.send('{"type":"heartbeat"}')
        await until(second, "command")
        second.send('{"type":"left","outcome":"failed","reason":"rank_killed","signal":11,"log_tail":"[1] stack"}')
        assert await until(second, "fenced") == {"type": "fenced", "noted": True}
    node = await Node.objects.aget(run=run, rank=1)
    assert (node.outcome, node.reason, node.signal, node.log_tail) == ("failed", "rank_killed", 11, "[1] stack")
    async with socket(f"{path(run, 1)}&last_word=1", TWO) as second:
        assert (await said(second))["type"] == "fenced"
    assert not await accepted(f"{path(run, 1)}&last_word=1", ONE)


async def test_the_logs_of_all_hosts_are_one_log(run: Run) -> None:
    async with socket(path(run), ONE) as first, socket(path(run, 1), TWO) as second:
        await said(first), await said(second)
        first.send(b"L" + (0).to_bytes(8, "little") + b"[0] one\n")
        await until(first, "log_ack")
        second.send(b"L" + (0).to_bytes(8, "little") + b"[1] two\n")
        assert await until(second, "log_ack") == {"type": "log_ack", "offset": 8}
        second.send(b"L" + (0).to_bytes(8, "little") + b"[1] two\n[1] three\n")
        assert await until(second, "log_ack") == {"type": "log_ack", "offset": 18}
    assert await sync_to_async(log.read)(run.pk, 0, 100) == b"[0] one\n[1] two\n[1] three\n"
    async with socket(path(run, 1), TWO) as second:
        assert (await said(second))["log_offset"] == 18


@pytest.mark.parametrize(
    ("node", "token", "frame"),
    [
        (1, TWO, events_frame(1, [started(), declared(), step(1)])),
        (1, TWO, '{"type":"rendezvous","at":"10.0.0.1:4711"}'),
        (1, TWO, '{"type":"left","outcome":"vanished"}'),
        (1, TWO, '{"type":"hanging"}'),
        (0, ONE, '{"type":"left","outcome":"failed"}'),
        (1, TWO, '{"type":"left","outcome":"failed","exit_code":"seven"}'),
        (0, ONE, '{"type":"rendezvous","at":"10.0.0.1"}'),
        (0, ONE, '{"type":"rendezvous","at":["10.0.0.1:1"]}'),
        (0, ONE, '{"type":"rendezvous","at":"[fe80::1%eth0]:4711"}'),
    ],
)
async def test_what_is_not_a_nodes_to_say_is_refused(run: Run, node: int, token: tuple[bytes, bytes], frame: bytes | str) -> None:
    async with socket(path(run, node), token) as it:
        await said(it)
        it.send(frame)
        assert (await until(it, "refused"))["error"]


async def test_a_token_speaks_for_its_own_node_alone(run: Run) -> None:
    other = await Worker.objects.acreate(name="x", host="x", pid=1, version="0", slots=1, last_seen=timezone.now())
    await Node.objects.acreate(run=run, worker=other, lease_until=timezone.now())  # a place: nobody can speak for it
    for node, token in ((0, TWO), (1, ONE), (2, TWO), (1, bearer(""))):
        assert not await accepted(path(run, node), token)
    assert not await accepted(f"/ws/ingest/{run.pk}/?attempt=0&node=1", TWO)
    assert not await accepted(f"/ws/ingest/{run.pk}/?attempt=1&node=-1", TWO)
