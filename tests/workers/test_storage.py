"""Checkpoints in a storage that hosts share: what goes in, what comes out, and what two hosts with supervisors of their own make of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from spec import events, storage
from tests.workers.conftest import Host
from workers import bring
from workers import keeper as keeping
from workers.bring import NotBrought, Porter
from workers.claim import Claim
from workers.fetch import AWAY, DISK_FULL, Wanted, fetch
from workers.keeper import Keeper
from workers.launch import launch
from workers.manifest import NotWhole, listed
from workers.storage import Away, Interrupted, Storage, check_storage, storage_url, told

FOLDER = storage.folder(1, datetime(2026, 1, 1, tzinfo=UTC))
PLACE = storage.place(FOLDER, 1, 10)


def saved(directory: Path, step: int = 10, **files: bytes) -> str:
    """Writes a checkpoint into `directory`, and returns the SHA-256 of its manifest."""
    final = directory / f"step-{step:08d}"
    path = final.with_suffix(".tmp")
    path.mkdir(parents=True)
    items = {}
    for name, data in ({"model": b"m" * 5_000_000, "empty": b""} | files).items():
        (path / f"{name}.bin").write_bytes(data)
        items[f"{name}.bin"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = json.dumps({"format": 1, "step": step, "files": items}).encode()
    (path / "MANIFEST.json").write_bytes(manifest)
    path.rename(final)
    return hashlib.sha256(manifest).hexdigest()


def hung(tmp_path: Path, shared: Path) -> str:
    """Puts a checkpoint into the storage of which one file never answers; the SHA-256 of its manifest."""
    sha256 = saved(tmp_path / "hung")
    Storage(f"file://{shared}").put(tmp_path / "hung" / "step-00000010", PLACE, lambda: True)
    (shared / PLACE / "empty.bin").unlink()
    os.mkfifo(shared / PLACE / "empty.bin")
    return sha256


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


class TestTheURL:
    @pytest.mark.parametrize(
        ("given", "same"),
        [
            ("file:///shared//checkpoints/", "file:///shared/checkpoints"),
            ("LOCAL:///shared/checkpoints", "file:///shared/checkpoints"),
            ("s3a://bucket/a/", "s3://bucket/a"),
            ("gcs://bucket", "gs://bucket"),
            ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ],
    )
    def test_one_storage_has_one_spelling(self, given: str, same: str) -> None:
        assert storage.normalised(given) == storage.normalised(same) == same

    @pytest.mark.parametrize(
        "url",
        [
            "/shared", "file://shared", "file:///", "s3://", "s3:///a", "memory://a", "https://host/a", "file:///a/../b", "s3://b/a?sig=SECRET",
            "s3://b/a#SECRET", "simplecache::s3://b", "s3://me:SECRET@b/a", "s3://me:SEC/RET@b/a", "s3://me:12/SECRET@b", "s3://b/" + 500 * "a", "s3://b/\nSECRET",
        ],
    )  # fmt: skip
    def test_what_cannot_be_shared_or_holds_a_secret_is_refused_without_being_repeated(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOELAB_CHECKPOINTS", url)
        with pytest.raises(ValueError, match=r"^MOELAB_CHECKPOINTS: ") as refused:
            storage_url()
        assert "SEC" not in str(refused.value) and refused.value.__cause__ is None

    def test_one_that_no_library_opens_is_refused_at_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MOELAB_CHECKPOINTS", "nonesuch://bucket/a")
        with pytest.raises(ValueError, match="no library here opens nonesuch://"):
            check_storage()
        monkeypatch.delenv("MOELAB_CHECKPOINTS")
        assert check_storage() == ""

    def test_one_that_is_away_when_its_library_connects_is_away_and_no_mistake_of_the_url(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            url = f"ftp://127.0.0.1:{taken.getsockname()[1]}/a"
            monkeypatch.setenv("MOELAB_CHECKPOINTS", url)
            assert check_storage() == url, "a worker may start before its storage does"
            with pytest.raises(Away, match="refused"):
                Storage(url)

    def test_runs_of_one_number_but_of_other_servers_have_other_folders(self) -> None:
        other = storage.folder(1, datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC))
        assert other != FOLDER and storage.PLACE.fullmatch(storage.place(other, 12, 123_456_789))


class TestACheckpoint:
    def test_it_comes_out_as_it_went_in_and_the_manifest_is_last(self, tmp_path: Path, shared: Path) -> None:
        sha256, keeps = saved(tmp_path / "a"), Storage(f"file://{shared}")
        written: list[str] = []
        write = keeps._write
        keeps._write = lambda name, chunks: (written.append(name.rpartition("/")[2]), write(name, chunks))[1]  # type: ignore[method-assign]
        assert keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True) == sha256
        assert written == ["model.bin", "empty.bin", "MANIFEST.json"]
        Storage(f"file://{shared}").get(PLACE, sha256, tmp_path / "b")
        for name in ("model.bin", "empty.bin", "MANIFEST.json"):
            assert (tmp_path / "b/step-00000010" / name).read_bytes() == (tmp_path / "a/step-00000010" / name).read_bytes()
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["step-00000010"]

    @pytest.mark.parametrize("fault", ["byte", "shorter", "longer", "lacking", "no manifest", "another manifest"])
    def test_a_damaged_one_leaves_nothing_here(self, tmp_path: Path, shared: Path, fault: str) -> None:
        sha256, keeps = saved(tmp_path / "a"), Storage(f"file://{shared}")
        keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        model, manifest = shared / PLACE / "model.bin", shared / PLACE / "MANIFEST.json"
        data = model.read_bytes()
        {
            "byte": lambda: model.write_bytes(data[:-1] + b"x"),
            "shorter": lambda: model.write_bytes(data[:-1]),
            "longer": lambda: model.write_bytes(data + b"x"),
            "lacking": model.unlink,
            "no manifest": manifest.unlink,
            "another manifest": lambda: manifest.write_text(manifest.read_text() + " "),
        }[fault]()
        with pytest.raises(NotWhole):
            keeps.get(PLACE, sha256, tmp_path / "b")
        assert not list((tmp_path / "b").glob("*")), "not even half of it"
        keeps.set_aside(PLACE)
        assert not manifest.exists() and (shared / PLACE).is_dir()

    def test_a_damaged_one_does_not_go_in(self, tmp_path: Path, shared: Path) -> None:
        saved(tmp_path / "a")
        (tmp_path / "a/step-00000010/model.bin").write_bytes(b"m")
        with pytest.raises(NotWhole, match=r"model\.bin is not what the manifest says"):
            Storage(f"file://{shared}").put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        assert not (shared / PLACE / "MANIFEST.json").exists()

    def test_a_copy_that_nobody_wants_any_more_ends_at_the_next_piece(self, tmp_path: Path, shared: Path) -> None:
        saved(tmp_path / "a")
        asked: list[int] = []
        with pytest.raises(Interrupted):
            Storage(f"file://{shared}").put(tmp_path / "a" / "step-00000010", PLACE, lambda: asked.append(1) or len(asked) < 2)
        assert len(asked) == 2 and not (shared / PLACE / "MANIFEST.json").exists()

    @pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ".", "", "MANIFEST.json", ".hidden", "a\x00", "a" * 101])
    def test_no_name_leads_out_of_its_directory(self, name: str) -> None:
        item = {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        with pytest.raises(NotWhole, match="which no checkpoint has"):
            listed(json.dumps({"format": 1, "step": 10, "files": {"model.bin": item, name: item}}).encode(), 10)

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"files": {}, "step": 10}', '{"files": {"a": {"size": true, "sha256": ""}}, "step": 10}', "[" * 99_999]
    )
    def test_nor_is_nonsense_a_manifest(self, text: str) -> None:
        with pytest.raises(NotWhole):
            listed(text.encode(), 10)

    def test_places_are_checked_before_anything_is_removed(self, shared: Path) -> None:
        for bad in ("..", f"{FOLDER}/attempt-1", f"{FOLDER}/attempt-1/..", f"{FOLDER}/attempt-1/step-00000010/../.."):
            with pytest.raises(ValueError, match="no place of a checkpoint"):
                Storage(f"file://{shared}").remove(bad)

    def test_a_storage_that_is_not_mounted_is_away_and_loses_nothing(self, tmp_path: Path, shared: Path) -> None:
        sha256, keeps = saved(tmp_path / "a"), Storage(f"file://{shared}")
        keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        shared.rename(tmp_path / "elsewhere")
        for empty in (False, True):
            if empty:
                shared.mkdir()
            with pytest.raises(Away, match="mounted"):
                keeps.get(PLACE, sha256, tmp_path / "b")
        shutil.rmtree(shared)
        with pytest.raises(Away, match="mounted"):
            keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        assert not shared.exists(), "it would be on this host's own disk"

    def test_a_tokenizer_is_kept_once_and_verified(self, tmp_path: Path, shared: Path) -> None:
        keeps = Storage(f"file://{shared}")
        assert keeps.get_tokenizer(PLACE) is None
        for _ in range(2):
            keeps.put_tokenizer(b"{}", PLACE)
        assert keeps.get_tokenizer(PLACE) == b"{}"
        (kept,) = (shared / FOLDER / "attempt-1").iterdir()
        kept.write_bytes(b"{ }")
        with pytest.raises(NotWhole):
            keeps.get_tokenizer(PLACE)

    @pytest.mark.parametrize("set_aside", [False, True])
    def test_only_who_tells_the_server_sets_a_damaged_one_aside_and_nobody_for_a_tokenizer(
        self, tmp_path: Path, shared: Path, set_aside: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MOELAB_CHECKPOINTS", f"file://{shared}")
        sha256, keeps = saved(tmp_path / "a"), Storage(f"file://{shared}")
        keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        wanted = Wanted(place=PLACE, sha256=sha256, run_dir=tmp_path / "b", set_aside=set_aside)
        bad = shared / FOLDER / "attempt-1" / f"tokenizer-{'0' * 64}.json"
        bad.write_bytes(b"{}")
        with pytest.raises(NotWhole, match="tokenizer"):
            fetch(wanted)
        assert (shared / PLACE / "MANIFEST.json").exists() and not (tmp_path / "b").exists()
        bad.unlink()
        (shared / PLACE / "model.bin").write_bytes(b"x")
        with pytest.raises(NotWhole, match=r"model\.bin"):
            fetch(wanted)
        assert (shared / PLACE / "MANIFEST.json").exists() is not set_aside

    def test_a_library_without_a_disk_does_as_well(self, tmp_path: Path) -> None:
        """The one that every fsspec has; shared it cannot be, and no worker takes its URL."""
        keeps, sha256 = Storage(f"memory://{tmp_path}"), saved(tmp_path / "a")
        with pytest.raises(Away, match="must be made"):
            keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        keeps._files.makedirs(keeps._root)
        keeps.put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        keeps.put_tokenizer(b"{}", PLACE)
        assert (keeps.places(FOLDER, 2), keeps.places(FOLDER, 1), keeps.get_tokenizer(PLACE)) == ([PLACE], [], b"{}")
        keeps.get(PLACE, sha256, tmp_path / "b")
        keeps.remove(PLACE)
        with pytest.raises(NotWhole, match="not there"):
            keeps.get(PLACE, sha256, tmp_path / "c")

    def test_what_a_library_says_is_one_line_without_signed_queries(self) -> None:
        assert told(OSError(28, "No space left on device")) == "it is full"
        assert told(RuntimeError("403 at https://b.s3/a?X-Amz-Signature=SECRET\nsorry")) == "403 at https://b.s3/a?… sorry"


class TestHosts:
    """Real supervisors of a trainer without a model. The second host has a home of its own, and shares a directory with the first."""

    @pytest.fixture
    def url(self, shared: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("MOELAB_CHECKPOINTS", f"file://{shared}")
        return f"file://{shared}"

    @staticmethod
    def move(host: Host, home: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
        monkeypatch.setenv("MOELAB_HOME", str(home))
        return Host(home, host.server)

    @staticmethod
    def known(host: Host, **fields: Any) -> dict[str, Any]:
        """With what the server would know by now of the storage."""
        words = [word for word in host.server.told if word["type"] == "stored"]
        held = [{**one, "place": storage.place(FOLDER, one["attempt"], one["step"])} for one in (words[-1]["checkpoints"] if words else [])]
        return {"stored_as": FOLDER, "checkpoints": held, **fields}

    def launch(self, host: Host, monkeypatch: pytest.MonkeyPatch, attempt: int = 1, steps: int = 30, **fields: Any) -> Any:
        more, own = self.known(host, **fields), host.claim
        monkeypatch.setattr(host, "claim", lambda **given: {**own(**given), **more})
        return host.launch(attempt=attempt, steps=steps)

    @staticmethod
    def places(shared: Path) -> list[str]:
        return sorted(str(path.parent.relative_to(shared / FOLDER)) for path in shared.rglob("MANIFEST.json"))

    def test_a_host_vanishes_and_another_goes_on_from_what_is_stored(
        self, worker_host: Host, tmp_path: Path, shared: Path, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = worker_host.server
        holder = self.launch(worker_host, monkeypatch, steps=1000)
        worker_host.wait(lambda: any(one["checkpoints"] for one in server.told))
        for pid in (holder.supervisor[0], holder.ranks[0][0]):
            os.kill(pid, signal.SIGKILL)
        worker_host.wait_until_quiet()
        from_step = server.told[-1]["checkpoints"][-1]["step"]
        second = self.move(worker_host, tmp_path / "second", monkeypatch)
        self.launch(second, monkeypatch, attempt=2, steps=from_step + 15, trained=1)
        second.wait_until_quiet()
        started, ended = server.events(2)[0], server.ended(2)
        assert isinstance(started, events.RunStarted) and started.resumed_from_step == from_step
        assert ended is not None and ended.outcome == "succeeded"
        assert server.steps(2) == list(range(from_step + 1, from_step + 16))
        word = server.told[-1]
        assert (word["storage"], word["problem"], word["checkpoints"][-1]["step"]) == (url, None, from_step + 15)
        assert self.places(shared)[-1] == f"attempt-2/step-{from_step + 15:08d}", "the last one was stored before the end was told"
        assert f"attempt-1/step-{from_step:08d} was fetched from {url}" in server.log[2].decode()
        assert self.places(shared) == [f"attempt-{one['attempt']}/step-{one['step']:08d}" for one in word["checkpoints"]]
        assert not list(second.home.glob("runs/1/attempts/*/storing"))

    def test_a_past_that_the_run_has_left_is_put_aside_and_a_copy_of_the_same_is_not_fetched(
        self, worker_host: Host, shared: Path, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = worker_host.home / "runs/1/checkpoints"
        for step, attempt in ((10, 1), (20, 2), (30, 1)):
            saved(own, step, **{"state": json.dumps({"attempt": attempt}).encode()})
            (own / f"step-{step:08d}" / "state.bin").rename(own / f"step-{step:08d}" / "state.json")
        known = hashlib.sha256((own / "step-00000020/MANIFEST.json").read_bytes()).hexdigest()
        held = [{"attempt": 2, "step": 20, "sha256": known, "place": storage.place(FOLDER, 2, 20)}]  # the storage has nothing: fetching would fail
        self.launch(worker_host, monkeypatch, attempt=3, steps=25, checkpoints=held, trained=2)
        worker_host.wait_until_quiet()
        started = worker_host.server.events(3)[0]
        assert isinstance(started, events.RunStarted) and started.resumed_from_step == 20
        assert sorted(path.name for path in own.iterdir()) == ["step-00000010.left", "step-00000020", "step-00000025", "step-00000030.left"]

    @pytest.mark.parametrize("why", ["this host goes down", "another host is lost"])
    def test_a_fetch_that_hangs_ends_when_nobody_waits_for_it(
        self, worker_host: Host, tmp_path: Path, shared: Path, url: str, why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        down, lost = why == "this host goes down", {"reason": "worker_lost", "detail": "node 1 was not heard from"}
        worker_host.server.hosts = None if down else {"rendezvous": "", "lost": None}
        sha256 = hung(tmp_path, shared)
        held = [{"attempt": 1, "step": 10, "sha256": sha256, "place": PLACE}]
        claim = worker_host.claim(attempt=2) | self.known(worker_host, checkpoints=held) | {"nodes": 1 if down else 2}
        launch(claim, worker_host.home / "runs")
        worker_host.wait(lambda: list(worker_host.home.glob("runs/1/checkpoints/*.tmp")))
        if down:
            os.kill(worker_host.running("workers.supervisor")[0].pid, signal.SIGTERM)
        else:
            worker_host.server.hosts = {"rendezvous": "", "lost": lost}
            worker_host.server.command()
        ended = worker_host.wait(lambda: worker_host.server.ended(2))
        assert (ended.outcome, ended.reason) == (("paused", "worker_stopped") if down else ("failed", "worker_lost"))
        worker_host.wait_until_quiet(5)
        assert not list(worker_host.home.glob("runs/1/checkpoints/*"))

    @pytest.mark.parametrize("fault", ["damaged", "away"])
    def test_what_cannot_be_fetched_ends_the_attempt_with_its_reason_and_counts_for_nothing(
        self, worker_host: Host, tmp_path: Path, shared: Path, url: str, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sha256 = saved(tmp_path / "a")
        Storage(url).put(tmp_path / "a" / "step-00000010", PLACE, lambda: True)
        if fault == "damaged":
            (shared / PLACE / "model.bin").write_bytes(b"x")
        else:
            monkeypatch.setenv("MOELAB_FETCH_PATIENCE_S", "0")
            shared.rename(tmp_path / "elsewhere")
        held = [{"attempt": 1, "step": 10, "sha256": sha256, "place": PLACE}]
        launch({**worker_host.claim(attempt=2), **self.known(worker_host, checkpoints=held)}, worker_host.home / "runs")
        ended = worker_host.wait(lambda: worker_host.server.ended(2))
        assert (ended.outcome, ended.reason) == ("paused", "checkpoint_unreachable")
        assert ("model.bin is not what the manifest says" if fault == "damaged" else "mounted") in ended.detail
        damaged = [word for word in worker_host.server.told if word["type"] == "damaged"]
        assert [(word["storage"], word["place"]) for word in damaged] == ([(url, PLACE)] if fault == "damaged" else [])
        assert not (worker_host.attempt_dir(attempt=2) / "result.json").exists(), "no rank was started"

    def test_a_storage_that_does_not_let_us_hurts_no_training_and_is_told_of_once(
        self, worker_host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MOELAB_CHECKPOINTS", f"file://{tmp_path}/never-mounted")
        monkeypatch.setenv("MOELAB_LAST_COPY_TIMEOUT_S", "0.4")
        self.launch(worker_host, monkeypatch, steps=15)
        worker_host.wait_until_quiet()
        server = worker_host.server
        ended = server.ended()
        assert ended is not None and ended.outcome == "succeeded" and server.steps() == list(range(1, 16))
        log = server.log[1].decode()
        assert log.count("could not be stored in") == 2, "once, and at the end, where it was waited for in vain"
        assert server.told[-1]["problem"]["step"] == 15 and "its copy was not finished 0." in server.told[-1]["problem"]["detail"]
        assert not (tmp_path / "never-mounted").exists()


class TestThePorter:
    """Without a supervisor."""

    @pytest.fixture
    def porter(self, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Porter:
        monkeypatch.setenv("MOELAB_CHECKPOINTS", f"file://{shared}")
        told = {"run": 1, "attempt": 4, "token": "t", "spec": {}, "devices": ["cpu:0"], "ingest_url": "/", "stored_as": FOLDER, "trained": 3}
        held = [
            {"attempt": attempt, "step": step, "sha256": "", "place": storage.place(FOLDER, attempt, step)} for attempt, step in ((2, 30), (3, 20))
        ]
        claim = Claim.model_validate({**told, "checkpoints": held})
        self.told: list[Any] = []
        return Porter(claim, tmp_path / "run", f"file://{shared}", say=lambda line: None, tell=self.told.append, wanted=lambda: True)

    async def test_a_fetch_that_hangs_is_killed_and_leaves_nothing(
        self, porter: Porter, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bring, "STANDSTILL_S", 1.0)
        wanted = Wanted(place=PLACE, sha256=hung(tmp_path, shared), run_dir=tmp_path / "run")
        code, words = await porter._once(wanted)
        assert code == AWAY and words.startswith("the storage hangs: nothing came for 1 s")
        assert not list((tmp_path / "run" / "checkpoints").glob("*"))

    async def test_the_newest_is_the_latest_attempts_not_the_one_with_most_steps(
        self, porter: Porter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = tmp_path / "run" / "checkpoints"
        held = [one.model_copy(update={"sha256": saved(own, one.step)}) for one in porter._claim.checkpoints]
        porter._claim = porter._claim.model_copy(update={"checkpoints": held})
        shutil.rmtree(own / "step-00000020")

        async def fetched(place: str, sha256: str, into: Path) -> None:
            assert (place, sha256, saved(own, 20)) == (held[1].place, held[1].sha256, held[1].sha256)

        monkeypatch.setattr(porter, "_fetch", fetched)
        await porter.bring()
        assert sorted(path.name for path in own.iterdir()) == ["step-00000020", "step-00000030.left"]

    async def test_whatever_else_a_fetch_may_say_is_asked_again_but_not_on_a_full_disk(self, porter: Porter, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = iter([(64, "no such host"), (1, "a traceback"), (DISK_FULL, "this host's disk is full")])

        async def answer(*_: object) -> Any:
            return next(answers)

        async def at_once(seconds: float) -> bool:
            return True

        monkeypatch.setattr(porter, "_once", answer), monkeypatch.setattr(porter, "_still_wanted", at_once)
        with pytest.raises(NotBrought, match="this host's disk is full"):
            await porter.bring()
        assert next(answers, None) is None and not self.told


class TestTheKeeper:
    """A keeper without its thread."""

    @pytest.fixture
    def keeper(self, tmp_path: Path, shared: Path) -> Keeper:
        told: dict[str, Any] = {
            "run": 1,
            "attempt": 2,
            "token": "t",
            "spec": {"training": {"keep_checkpoints": 2}},
            "devices": ["cpu:0"],
            "ingest_url": "/",
        }
        held = [{"attempt": 1, "step": step, "sha256": "", "place": storage.place(FOLDER, 1, step)} for step in (10, 20)]
        claim = Claim.model_validate({**told, "stored_as": FOLDER, "checkpoints": held})
        self.said, self.told, self.current = list[str](), list[Any](), True
        made = Keeper(claim, tmp_path / "run", f"file://{shared}", say=self.said.append, tell=self.told.append, current=lambda: self.current)
        made._in_loop = lambda function, *arguments: function(*arguments)  # type: ignore[method-assign]
        return made

    def test_the_rule_of_the_disk_holds_and_half_copies_of_older_attempts_go_but_nothing_of_a_later_one(
        self, keeper: Keeper, tmp_path: Path, shared: Path
    ) -> None:
        for attempt, step in ((1, 5), (1, 10), (1, 20), (3, 15), (3, 99)):
            saved(shared / FOLDER / f"attempt-{attempt}", step)
        (shared / storage.place(FOLDER, 1, 5) / "MANIFEST.json").unlink()
        for step in (15, 30, 40):
            saved(tmp_path / "run" / "checkpoints", step)
            keeper._store(step, tmp_path / "run" / "attempts" / "2" / "storing")
        left = sorted(str(path.relative_to(shared / FOLDER)) for path in shared.glob(f"{FOLDER}/*/*"))
        assert left == ["attempt-2/step-00000030", "attempt-2/step-00000040", "attempt-3/step-00000015", "attempt-3/step-00000099"]
        assert [(held.attempt, held.step) for held in keeper._held] == [(2, 30), (2, 40)]

    def test_one_that_has_lost_the_server_removes_nothing_until_it_is_back(self, keeper: Keeper, tmp_path: Path, shared: Path) -> None:
        """A later attempt may be fetching what it would remove."""
        for step in (10, 20):
            saved(shared / FOLDER / "attempt-1", step)
        self.current = False
        for step in (30, 40, 50):
            saved(tmp_path / "run" / "checkpoints", step)
            self.current = step == 50
            before = len(list(shared.rglob("MANIFEST.json")))
            keeper._store(step, tmp_path / "scratch")
            assert len(list(shared.rglob("MANIFEST.json"))) == (2 if self.current else before + 1)
        assert [(held.attempt, held.step) for held in keeper._held] == [(2, 40), (2, 50)]

    async def test_of_what_is_saved_during_a_slow_copy_the_newest_is_next_and_the_slow_one_is_whole_although_the_disk_has_lost_it(
        self, keeper: Keeper, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun, go_on, write = threading.Event(), threading.Event(), Storage._write

        def slowly(storage: Storage, name: str, chunks: Iterator[bytes]) -> None:
            begun.set()
            assert go_on.wait(10)
            write(storage, name, chunks)

        monkeypatch.setattr(Storage, "_write", slowly)
        own = tmp_path / "run" / "checkpoints"
        keeper.start()
        sha256 = saved(own, 30)
        assert await asyncio.to_thread(begun.wait, 10)
        saved(own, 40), saved(own, 50)
        shutil.rmtree(own / "step-00000030")
        go_on.set()
        await keeper.finish(lambda: True)
        assert [(held.attempt, held.step) for held in keeper._held] == [(2, 30), (2, 50)] and keeper._held[0].sha256 == sha256
        Storage(f"file://{shared}").get(storage.place(FOLDER, 2, 30), sha256, tmp_path / "out")
        assert not self.said and self.told[-1]["problem"] is None

    def test_a_fenced_one_stops_before_it_publishes(self, keeper: Keeper, tmp_path: Path, shared: Path) -> None:
        saved(tmp_path / "run" / "checkpoints", 30)
        keeper.close()
        with pytest.raises(Interrupted):
            keeper._store(30, tmp_path / "run" / "attempts" / "2" / "storing")
        assert not list(shared.rglob("MANIFEST.json"))

    async def test_whoever_cancels_during_the_last_copy_does_not_wait_for_it(
        self, keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go_on, turns = threading.Event(), iter([False, False, True])
        monkeypatch.setattr(keeping, "HURRIED_S", 0.0)
        monkeypatch.setattr(Storage, "_write", lambda *_: go_on.wait(10))
        keeper.start()
        saved(tmp_path / "run" / "checkpoints", 30)
        async with asyncio.timeout(5):
            await keeper.finish(lambda: True, hurried=lambda: next(turns))
        go_on.set()
        assert "its copy was not finished 0." in self.said[0] and next(turns, None) is None
