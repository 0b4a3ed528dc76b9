"""What a browser can rely on: what it was told, put together, is what the store says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.test import Client

from experiments.live import publish as publishing
from experiments.live import snapshot, viewer
from experiments.models import Membership, Project, Run
from experiments.models.telemetry import Event
from experiments.telemetry import read
from moelab.embedded import Valkey
from spec import block, events
from tests.experiments.telemetry.conftest import declared, events_frame, person, started, step, token_of
from tests.experiments.telemetry.sockets import ORIGIN, Socket, accepted, bearer, said, socket, until

RUN_TOKEN = bearer("run-token")


@pytest.fixture(autouse=True)
def _valkey(valkey_url: str) -> None:
    """These tests have one, and forget that it was away."""
    publishing._quiet_until = 0.0


@pytest.fixture
def reading(run: Run) -> tuple[bytes, bytes]:
    return bearer(token_of(run.owner, "read"))


class Picture:
    """A browser's `apply()`: steps by number, rows that are void forgotten and fetched again."""

    def __init__(self) -> None:
        self.steps: dict[int, bytes] = {}
        self.last_event = 0
        self.doubled = 0

    def apply(self, frame: dict[str, Any], run_id: int) -> None:
        if frame["type"] == "steps":
            self._take(frame["arrays"], live=True)
        elif frame["type"] == "resync":
            self.steps = {number: row for number, row in self.steps.items() if number < frame["from_step"]}
            facts = read.Facts.fetch(run_id)
            _, arrays = block.decode(read.steps_block(facts, frame["from_step"], kinds=["expert_tokens"]))
            self._take(arrays, live=False)
        elif frame["type"] == "hello":
            self.last_event = frame["last_event"]
        elif frame["type"] == "event":
            assert frame["event"]["id"] > self.last_event
            self.last_event = frame["event"]["id"]

    def place(self) -> str:
        """The query of a reconnect."""
        return f"after={max(self.steps, default=0)}&event={self.last_event}"

    def _take(self, arrays: dict[str, Any], *, live: bool) -> None:
        for i, number in enumerate(arrays["step"].tolist()):
            self.doubled += live and number in self.steps
            self.steps[number] = arrays["scalars"][i].tobytes() + arrays["expert_tokens"][i].tobytes()


def stored(run: Run) -> dict[int, bytes]:
    picture = Picture()
    _, arrays = block.decode(read.steps_block(read.Facts.fetch(run.pk), kinds=["expert_tokens"]))
    picture._take(arrays, live=False)
    return picture.steps


async def see(it: Socket, picture: Picture, run: Run, until_step: int, timeout_s: float = 20) -> None:
    """Applies frames until the picture has `until_step`."""
    async with asyncio.timeout(timeout_s):
        while until_step not in picture.steps:
            await sync_to_async(picture.apply)(await said(it, timeout_s), run.pk)


async def send(it: Socket, said_: list[Any], attempt: int = 1) -> None:
    it.send(events_frame(attempt, said_))
    await until(it, "ack")


async def test_history_then_live_without_gap_or_double(run: Run, reading: tuple[bytes, bytes]) -> None:
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender:
        await send(sender, [started(), declared(), *(step(n) for n in range(1, 21))])
        async with socket(f"/ws/runs/{run.pk}/?after=5", reading) as it:
            hello = await said(it)
            assert (hello["type"], hello["last_step"], hello["run"]["id"]) == ("hello", 20, run.pk)
            picture = Picture()
            await see(it, picture, run, 20)
            assert sorted(picture.steps) == list(range(6, 21))
            for n in range(21, 60, 3):
                await send(sender, [step(n), step(n + 1), step(n + 2)])
            await see(it, picture, run, 59)
            assert picture.doubled == 0
            whole = await sync_to_async(stored)(run)
            assert picture.steps == {n: whole[n] for n in range(6, 60)}


async def test_a_picture_equals_the_store_whatever_happens_to_the_wires(make_run: Callable[..., Run], owner: User) -> None:
    """Reconnects, frames sent again, late steps, archived steps, a viewer that stops reading: always the same picture as a new viewer's."""
    rng = random.Random(7)
    token = bearer(await sync_to_async(token_of)(owner, "read"))
    for _ in range(2):
        run = await sync_to_async(make_run)()
        picture, attempt, at = Picture(), 1, 1
        steady = Picture()
        async with socket(f"/ws/runs/{run.pk}/?after=0", token) as always:
            for _ in range(4):
                async with socket(f"/ws/ingest/{run.pk}/?attempt={attempt}", RUN_TOKEN) as sender:
                    await said(sender)
                    if at == 1 or attempt > 1:
                        await send(sender, [started(attempt, at - 1 if attempt > 1 else None), declared()], attempt)
                    async with socket(f"/ws/runs/{run.pk}/?{picture.place()}", token) as it:
                        for _ in range(rng.randrange(1, 6)):
                            if rng.random() < 0.3:
                                it.reading.clear()
                            count = rng.randrange(1, 30)
                            numbers = [n for n in range(at, at + count) if rng.random() < 0.9] or [at]
                            await send(sender, [step(n, salt=attempt) for n in numbers], attempt)
                            at += count
                            if rng.random() < 0.3:
                                await sync_to_async(lambda: [s.missed() for subs in _subscriptions() for s in subs])()
                        it.reading.set()
                        await see(it, picture, run, numbers[-1])
                        await see(always, steady, run, numbers[-1])
                back = rng.randrange(1, at)
                attempt, at = attempt + 1, back
                hashes = [*run.attempt_token_sha256s, *[run.attempt_token_sha256s[0]] * attempt]
                await Run.objects.filter(pk=run.pk).aupdate(attempt=attempt, attempt_token_sha256s=hashes)
            async with socket(f"/ws/ingest/{run.pk}/?attempt={attempt}", RUN_TOKEN) as sender:
                await said(sender)
                await send(sender, [started(attempt, at - 1), declared(), step(at, salt=attempt)], attempt)
                await asyncio.sleep(0.1)
            async with socket(f"/ws/runs/{run.pk}/?{picture.place()}", token) as it:
                for who, seen in ((it, picture), (always, steady)):
                    async with asyncio.timeout(20):
                        while seen.steps != await sync_to_async(stored)(run):
                            await sync_to_async(seen.apply)(await said(who), run.pk)


def _subscriptions() -> list[set[Any]]:
    from experiments.live import reader

    return [subs for one in reader._readers.values() for subs in one._subscribers.values()]


async def test_a_viewer_that_does_not_read_hurts_nobody(run: Run, reading: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "STUCK_S", 1.0)
    path = f"/ws/runs/{run.pk}/?after=0"
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender, socket(path, reading) as good, socket(path, reading) as stuck:
        await said(sender)
        await until(stuck, "hello")
        stuck.reading.clear()
        picture, slowest = Picture(), 0.0
        await send(sender, [started(), declared()])
        for n in range(1, 40):
            before = asyncio.get_running_loop().time()
            await send(sender, [step(n)])
            await see(good, picture, run, n)
            slowest = max(slowest, asyncio.get_running_loop().time() - before)
            await asyncio.sleep(0.05)
        assert slowest < 2.0, "of many ticks, none waited for the other viewer"
        async with asyncio.timeout(5):
            while not stuck.over:
                await asyncio.sleep(0.1)


async def test_a_viewer_that_fell_behind_is_filled_from_the_store(run: Run, reading: tuple[bytes, bytes]) -> None:
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender, socket(f"/ws/runs/{run.pk}/?after=0", reading) as slow:
        await until(slow, "hello")
        slow.reading.clear()
        await said(sender)
        await send(sender, [started(), declared()])
        big = {"expert_tokens": np.ones((16, 256), np.uint32)}
        for n in range(1, 40):
            await send(sender, [events.StepDone(n, 1.7e9, np.zeros(2, np.float32), big)])
            await asyncio.sleep(0.06)
        slow.reading.set()
        frames = []
        async with asyncio.timeout(10):
            while not frames or frames[-1][-1] != 39:
                frames.append((await until(slow, "steps"))["step"])
        assert [n for frame in frames for n in frame] == list(range(1, 40))
        assert max(len(frame) for frame in frames) > 10, "what was queued too long comes as one block"


async def test_too_much_at_once_is_fetched_not_pushed(run: Run, reading: tuple[bytes, bytes]) -> None:
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender, socket(f"/ws/runs/{run.pk}/?after=0", reading) as it:
        await until(it, "hello")
        await said(sender)
        await send(sender, [started(), declared(), *(step(n, tensors=False) for n in range(1, 701))])
        assert (await until(it, "resync"))["from_step"] == 1


async def test_steps_wait_behind_what_is_to_be_fetched(run: Run, reading: tuple[bytes, bytes]) -> None:
    """Else a connection that breaks in between would leave a hole: the viewer's place would be behind it."""
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender, socket(f"/ws/runs/{run.pk}/?after=0", reading) as it:
        await until(it, "hello")
        await said(sender)
        await send(sender, [started(), declared(), *(step(n, tensors=False) for n in range(1, 701))])
        await until(it, "resync")
        await send(sender, [step(n, tensors=False) for n in range(701, 1401)])
        await send(sender, [step(1401)])
        heard = []
        while not heard or heard[-1]["type"] != "resync":
            heard.append(await said(it))
        assert heard[-1]["from_step"] == 701 and "steps" not in {frame["type"] for frame in heard}
        await send(sender, [step(1402)])
        assert (await until(it, "steps"))["step"] == [1402]


async def test_a_new_attempt_voids_what_a_viewer_has_fetched_beyond_its_place(run: Run, reading: tuple[bytes, bytes]) -> None:
    """Told to fetch, it may have more than its place says; and it is told before the event, so that no broken connection hides it."""
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender:
        await said(sender)
        await send(sender, [started(), declared(), *(step(n) for n in range(1, 25))])
    _, first = await sync_to_async(snapshot.position)(run.pk)
    await Run.objects.filter(pk=run.pk).aupdate(attempt=2, attempt_token_sha256s=[*run.attempt_token_sha256s, *run.attempt_token_sha256s])
    async with socket(f"/ws/ingest/{run.pk}/?attempt=2", RUN_TOKEN) as sender:
        await said(sender)
        await send(sender, [started(2, 15), declared(), *(step(n, salt=2) for n in range(16, 31))], 2)
        _, newest = await sync_to_async(snapshot.position)(run.pk)
        async with socket(f"/ws/runs/{run.pk}/?after=12&event={first}", reading) as it:
            await until(it, "hello")
            assert await said(it) == {"type": "resync", "from_step": 13, "last_event": newest}
            assert (await said(it))["event"]["attempt"] == 2
        async with socket(f"/ws/runs/{run.pk}/?after=30&event={newest}", reading) as it:
            await until(it, "hello")
            await send(sender, [step(31, salt=2)], 2)
            heard = [await said(it) for _ in range(2)]
            assert "resync" not in {frame["type"] for frame in heard} and [31] in [frame.get("step") for frame in heard]


async def test_events_log_and_run_arrive(run: Run, reading: tuple[bytes, bytes]) -> None:
    async with socket(f"/ws/runs/{run.pk}/", reading) as it, socket("/ws/runs/", reading) as listed:
        await until(it, "hello")
        await until(listed, "hello")
        async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender:
            await said(sender)
            text = "grüße\n".encode()
            for start, end in ((0, 3), (3, 8)):
                sender.send(b"L" + start.to_bytes(8, "little") + text[start:end])
                await until(sender, "log_ack")
            first, second = await until(it, "log"), await until(it, "log")
            assert first["text"] + second["text"] == "grüße\n"
            assert (first["offset"], second["offset"]) == (0, 2)
            await send(sender, [started(), declared(), step(1), events.EvalDone(step=1, at=1.7e9, loss=2.5)])
            assert (await until(it, "event"))["event"]["kind"] == "run_started"
            assert (await until(it, "event"))["event"]["body"]["loss"] == 2.5
            assert (await until(it, "run"))["run"]["best_val_loss"] == 2.5
            assert (await until(listed, "run"))["run"]["id"] == run.pk


async def test_pings_are_answered_and_floods_are_not(run: Run, reading: tuple[bytes, bytes]) -> None:
    async with socket(f"/ws/runs/{run.pk}/", reading) as it:
        it.send('{"type":"ping"}')
        assert await until(it, "pong")
        for nonsense in ("x", "[]", "null", "[" * 4000):
            it.send(nonsense)
        it.send('{"type":"ping"}')
        assert await until(it, "pong")
        for _ in range(100):
            it.send("{}")
        assert (await until(it, "close"))["code"] == 1008
    async with socket(f"/ws/runs/{run.pk}/", reading) as it:
        it.send("x" * 5000)
        assert (await until(it, "close"))["code"] == 1009


async def test_who_may_watch(run: Run, project: Project) -> None:
    path = f"/ws/runs/{run.pk}/"
    outsider = await sync_to_async(person)("outsider")
    tokens = {
        name: bearer(await sync_to_async(token_of)(user, scope))
        for name, user, scope in [
            ("read", run.owner, "read"),
            ("ingest", run.owner, "ingest"),
            ("outsider", outsider, "read"),
        ]
    }
    assert await accepted(path, tokens["read"])
    for headers in ((), (tokens["ingest"],), (tokens["outsider"],), (bearer("mlk_wrong"),), (RUN_TOKEN,), ((b"authorization", b"Basic eDp5"),)):
        assert not await accepted(path, *headers), headers
    assert not await accepted(f"/ws/runs/{run.pk + 1}/", tokens["read"])
    assert not await accepted(f"/ws/runs/{2**70}/", tokens["read"])
    assert await accepted("/ws/runs/", tokens["outsider"])
    assert not await accepted("/ws/runs/")


async def test_a_cookie_counts_only_from_our_own_pages(run: Run) -> None:
    browser = Client()
    await sync_to_async(browser.force_login)(run.owner)
    cookie = (b"cookie", f"sessionid={browser.cookies['sessionid'].value}".encode())
    path = f"/ws/runs/{run.pk}/"
    assert await accepted(path, cookie, ORIGIN)
    for origin in (b"http://evil.example", b"null", b"", b"http://localhost.evil.example", b"http://localhost:81"):
        assert not await accepted(path, cookie, (b"origin", origin)), origin
    assert not await accepted(path, cookie)
    assert not await accepted(path, cookie, (b"origin", b"http://evil.example"), host=(b"host", b"evil.example"))
    assert not await accepted(path, ORIGIN)


async def test_a_right_that_is_taken_away_closes_the_socket(run: Run, reading: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "RECHECK_S", 0.3)
    async with socket(f"/ws/runs/{run.pk}/", reading) as it:
        await until(it, "hello")
        await Membership.objects.filter(user=run.owner).adelete()
        assert (await until(it, "close", 3))["code"] == 4403


async def test_the_list_shows_only_ones_own_runs(run: Run) -> None:
    outsider = bearer(await sync_to_async(lambda: token_of(person("outsider"), "read"))())
    mine = bearer(await sync_to_async(token_of)(run.owner, "read"))
    async with socket("/ws/runs/", outsider) as theirs, socket("/ws/runs/", mine) as ours:
        await until(theirs, "hello")
        await until(ours, "hello")
        await sync_to_async(publishing.publish)(run.pk, [publishing.Message("run")])
        assert (await until(ours, "run"))["run"]["id"] == run.pk
        with pytest.raises(TimeoutError):
            await said(theirs, 1)


async def test_valkey_dies_and_comes_back(run: Run, reading: tuple[bytes, bytes], valkey: Valkey) -> None:
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender, socket(f"/ws/runs/{run.pk}/?after=0", reading) as it:
        await said(sender)
        picture = Picture()
        await send(sender, [started(), declared(), step(1)])
        await see(it, picture, run, 1)
        valkey.stop()
        try:
            before = asyncio.get_running_loop().time()
            await send(sender, [step(2)])
            assert asyncio.get_running_loop().time() - before < 1
            await see(it, picture, run, 2, 5)
            async with socket(f"/ws/runs/{run.pk}/?after=0", reading) as new:
                await see(new, Picture(), run, 2, 5)
        finally:
            valkey.start()
        await asyncio.sleep(2.5)
        for n in range(3, 30):
            await send(sender, [step(n)])
        await see(it, picture, run, 29, 10)
        assert sorted(picture.steps) == list(range(1, 30))
        assert await Event.objects.filter(run=run).acount() == 1


async def test_what_could_not_be_said_is_made_good(run: Run, reading: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Valkey answers too late for one frame, and nothing follows that would show viewers the gap."""
    monkeypatch.setattr(publishing, "PAUSE_S", 0.2)
    async with socket(f"/ws/ingest/{run.pk}/?attempt=1", RUN_TOKEN) as sender, socket(f"/ws/runs/{run.pk}/?after=0", reading) as it:
        await said(sender)
        await send(sender, [started(), declared()])
        await until(it, "event")
        publishing._quiet_until = asyncio.get_running_loop().time() + 0.3  # both are the monotonic clock
        await send(sender, [step(1)])
        picture = Picture()
        await see(it, picture, run, 1, 3)
