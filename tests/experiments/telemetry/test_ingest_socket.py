"""What a supervisor can rely on: it is told what is stored, what is wanted, and when to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from asgiref.sync import sync_to_async

from experiments.live.publish import Message, publish
from experiments.models import Run
from experiments.models.telemetry import LogChunk, StepScalar
from experiments.telemetry import log
from moelab.embedded import Postgres
from spec import events
from tests.experiments.telemetry.conftest import declared, events_frame, person, started, step, token_of
from tests.experiments.telemetry.sockets import accepted, bearer, said, socket, until

RUN_TOKEN = bearer("run-token")


def path(run: Run, attempt: int = 1) -> str:
    return f"/ws/ingest/{run.pk}/?attempt={attempt}"


@pytest.fixture(autouse=True)
def _valkey(valkey_url: str) -> None:
    """These tests have one."""


async def steps_of(run: Run) -> list[int]:
    return [number async for number in StepScalar.objects.filter(run=run).values_list("step", flat=True).order_by("step")]


async def test_a_conversation(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        hello = await said(it)
        assert hello == {"type": "hello", "acked": {"1": 0}, "log_offset": 0, "desired": "run", "checkpoint_requests": 0}
        it.send(events_frame(1, [started(), declared(), step(1), step(2)]))
        assert await until(it, "ack") == {"type": "ack", "attempt": 1, "seq": 4}
        it.send(b"L" + (0).to_bytes(8, "little") + "zwölf\n".encode())
        assert await until(it, "log_ack") == {"type": "log_ack", "offset": 7}
        it.send('{"type":"heartbeat"}')
        assert await until(it, "command") == {"type": "command", "desired": "run", "checkpoint_requests": 0}
    assert await steps_of(run) == [1, 2]
    await run.arefresh_from_db()
    assert run.lease_until is not None
    async with socket(path(run), RUN_TOKEN) as it:
        hello = await said(it)
        assert (hello["acked"], hello["log_offset"]) == ({"1": 4}, 7)
        it.send(events_frame(1, [step(3)]))
        assert (await until(it, "ack"))["seq"] == 5


async def test_two_sockets_send_the_same_records(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as one, socket(path(run), RUN_TOKEN) as two:
        await said(one), await said(two)
        frame = events_frame(1, [started(), declared(), step(1)])
        one.send(frame)
        two.send(frame)
        assert (await until(one, "ack"))["seq"] == (await until(two, "ack"))["seq"] == 3
        two.send(events_frame(1, [step(2)]))
        await until(two, "ack")
        one.send(events_frame(1, [step(2), step(3)]))
        assert (await until(one, "ack"))["seq"] == 5
    assert await steps_of(run) == [1, 2, 3]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"X123",
        b"E",
        b"E\x01\0\0\0abc",
        events_frame(1, [started()])[:-3],
        events_frame(1, [started()])[:-1] + b"!",
        events_frame(9, [started()]),
        b"L123",
        b"L" + (99).to_bytes(8, "little") + b"gap",
        b"E" + bytes(4_000_001),
    ],
)
async def test_a_malformed_frame_is_refused(run: Run, frame: bytes) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        it.send(frame)
        assert "error" in await until(it, "refused")
        assert await said(it) == {"type": "close", "code": 4400}
    assert await steps_of(run) == []


@pytest.mark.parametrize("text", ["", "x", "[]", "[" * 100_000, '{"type":"nothing"}'])
async def test_malformed_text_is_refused(run: Run, text: str) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        it.send(text)
        assert "error" in await until(it, "refused")


async def test_who_may_send(make_run: Callable[..., Run]) -> None:
    run = await sync_to_async(make_run)()
    other = await sync_to_async(make_run)(attempt_token_sha256s=[])
    recorded = await sync_to_async(make_run)(attempt=0, recorded=True)
    users_token = await sync_to_async(token_of)(run.owner, "ingest")
    reading = await sync_to_async(token_of)(run.owner, "read")
    stranger = await sync_to_async(lambda: token_of(person("stranger"), "ingest"))()
    assert await accepted(path(run), RUN_TOKEN)
    assert await accepted(path(recorded, 0), bearer(users_token))
    refusals = [
        (run, 1, ()),
        (run, 1, (bearer("wrong"),)),
        (run, 2, (RUN_TOKEN,)),
        (run, 0, (RUN_TOKEN,)),
        (other, 1, (RUN_TOKEN,)),
        (run, 1, (bearer(users_token),)),
        (recorded, 0, (bearer(reading),)),
        (recorded, 0, (bearer(stranger),)),
        (recorded, 0, (RUN_TOKEN,)),
        (recorded, 1, (bearer(users_token),)),
    ]
    for which, attempt, headers in refusals:
        assert not await accepted(path(which, attempt), *headers), (which, attempt, headers)
    assert not await accepted(f"/ws/ingest/{2**70}/?attempt=1", RUN_TOKEN)
    assert not await accepted(f"/ws/ingest/{run.pk}/?attempt=one", RUN_TOKEN)


async def test_a_later_attempt_fences_an_open_socket(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        await Run.objects.filter(pk=run.pk).aupdate(attempt=2)
        it.send(events_frame(1, [started()]))
        assert (await until(it, "fenced"))["type"] == "fenced"
        assert await said(it) == {"type": "close", "code": 4409}
    async with socket(path(run), RUN_TOKEN) as it:
        assert (await said(it))["type"] == "fenced"


async def test_an_attempt_that_was_given_up_is_told_so_without_asking(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        await Run.objects.filter(pk=run.pk).aupdate(state="failed")
        assert (await until(it, "fenced", 4))["type"] == "fenced"


async def test_cancel_arrives_within_a_second(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        await asyncio.sleep(0.2)
        await Run.objects.filter(pk=run.pk).aupdate(desired="cancel", checkpoint_requests=1)
        assert await sync_to_async(publish)(run.pk, [Message("run")])
        assert await until(it, "command", 1) == {"type": "command", "desired": "cancel", "checkpoint_requests": 1}


async def test_cancel_arrives_within_three_seconds_without_valkey(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        await Run.objects.filter(pk=run.pk).aupdate(desired="cancel")
        assert (await until(it, "command", 3))["desired"] == "cancel"


@pytest.mark.chaos
async def test_the_database_restarts(run: Run, postgres: Postgres) -> None:
    """The sender is told to come again, and goes on from what is stored, which may be more than it heard of; a viewer stays."""
    reading = bearer(await sync_to_async(token_of)(run.owner, "read"))
    async with socket(f"/ws/runs/{run.pk}/?after=0", reading) as viewer:
        await until(viewer, "hello")
        async with socket(path(run), RUN_TOKEN) as it:
            await said(it)
            it.send(events_frame(1, [started(), declared(), step(1)]))
            await until(it, "ack")
            postgres.stop()
            try:
                it.send(events_frame(1, [step(2)]))
                assert (await until(it, "close"))["code"] == 1013
            finally:
                postgres.start()
        async with asyncio.timeout(60):  # the pool of connections looks at ever longer intervals whether the database is back
            while not await accepted(path(run), RUN_TOKEN):
                await asyncio.sleep(0.5)
        async with socket(path(run), RUN_TOKEN) as it:
            stored = (await said(it))["acked"]["1"]
            assert stored in (3, 4), "what was being written when the socket closed may be stored once the database is back"
            it.send(events_frame(1, [step(number) for number in (2, 3)][stored - 3 :]))
            await until(it, "ack")
        seen: list[int] = []
        async with asyncio.timeout(20):
            while 3 not in seen:
                seen += (await until(viewer, "steps"))["step"]
    assert seen == [1, 2, 3]


async def test_the_log_may_follow_the_end(run: Run) -> None:
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        ended = events.RunEnded(at=1.7e9, outcome="failed", reason="oom", detail="nul \0 and \ud800")
        it.send(events_frame(1, [started(), ended]))
        await until(it, "ack")
        it.send('{"type":"heartbeat"}')
        await until(it, "command")
        it.send(b"L" + bytes(8) + b"last words")
        assert (await until(it, "log_ack"))["offset"] == 10
    await run.arefresh_from_db()
    assert (run.state, run.reason, run.log_size) == ("failed", "oom", 10)


async def test_log_bytes_that_come_twice_are_kept_once(run: Run) -> None:
    text = "ä" * 1000
    data = text.encode()
    async with socket(path(run), RUN_TOKEN) as it:
        await said(it)
        for start, end in ((0, 701), (300, 900), (900, 1500), (0, 2000)):
            it.send(b"L" + start.to_bytes(8, "little") + data[start:end])
            assert (await until(it, "log_ack"))["offset"] == end
    assert await sync_to_async(log.read)(run.pk, 0, 5000) == data
    assert await sync_to_async(log.read)(run.pk, 650, 100) == data[650:750]
    assert await LogChunk.objects.filter(run=run).acount() == 4
