"""Keeps an attempt's checkpoints in the storage that hosts share, beside the training: a thread of the supervisor's, which nothing waits for
until the ranks have ended.

The newest checkpoint is copied; those that were saved while a copy was being made, but for the newest, are left out. Errors are tried
again with back-off, said once in the log, and told to the server, as is what the storage holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spec.storage import place
from workers.claim import Claim, Held
from workers.disk import published
from workers.manifest import NotWhole
from workers.storage import TOKENIZER, Away, Interrupted, Storage

LAST_COPY_S = float(os.environ.get("MOELAB_LAST_COPY_TIMEOUT_S", "300"))
"""How long the end of an attempt waits for its last checkpoint."""
IN_VAIN_S, HURRIED_S = 20.0, 5.0
"""The same where the storage has said no, and where somebody waits for the run to be gone, or the host goes down."""
_LOOK_S = 0.25
_BACK_OFF_S = (2.0, 300.0)

logger = logging.getLogger("workers.keeper")


class Keeper:
    """`start()` once the ranks run, `finish()` once they have ended, `close()` at last; all in the event loop's thread."""

    def __init__(
        self,
        claim: Claim,
        run_dir: Path,
        url: str,
        *,
        say: Callable[[str], None],
        tell: Callable[[Mapping[str, Any]], None],
        current: Callable[[], bool],
    ) -> None:
        """`say` takes a line for the log, `tell` a message for the server; both are called in the event loop's thread. `current` says,
        in any thread, whether the server has confirmed a moment ago that the attempt holds the run: only then is anything removed, for
        another may be fetching it.
        """
        self._claim, self._run_dir, self._url, self._say, self._tell, self._current = claim, run_dir, url, say, tell, current
        self._keep = int(claim.spec.get("training", {}).get("keep_checkpoints", 3))
        self._held = sorted((held for held in claim.checkpoints if held.place), key=lambda held: held.age)
        self._problem: tuple[int, str] | None = None
        self._said, self._swept = "", False
        self._finishing, self._closed, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to look for checkpoints that are new from now on."""
        self._old = published(self._run_dir / "checkpoints")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)  # a storage that hangs keeps no process alive
        self._thread.start()

    async def finish(self, wanted: Callable[[], bool], *, hurried: Callable[[], bool] = lambda: False) -> None:
        """Waits for the last copy, while it is `wanted` and not for ever. Both are asked on each turn."""
        if self._thread is None:
            return
        self._finishing.set()
        began, limit_s = time.monotonic(), LAST_COPY_S
        while not self._idle.is_set() and wanted() and time.monotonic() - began < limit_s:
            await asyncio.sleep(_LOOK_S / 5)
            if self._problem is not None:
                limit_s = min(limit_s, IN_VAIN_S)
            if hurried():
                limit_s = min(limit_s, HURRIED_S)
        if not self._idle.is_set():
            self._closed.set()
            step = max(published(self._run_dir / "checkpoints"), default=0)
            why = f" ({self._problem[1]})" if self._problem else ""
            self._trouble(step, f"its copy was not finished {time.monotonic() - began:.1f} s after the end{why}", "it lies on this host only")

    def close(self) -> None:
        """No further piece is copied."""
        self._closed.set()
        self._finishing.set()

    # ----- the thread

    def _run(self) -> None:
        scratch = self._run_dir / "attempts" / str(self._claim.attempt) / "storing"
        try:
            self._keep_on(scratch)
        except Exception as error:  # ours: the training goes on, and its end does not wait for it
            logger.exception("nothing is stored any more")
            self._in_loop(self._trouble, max(published(self._run_dir / "checkpoints"), default=0), repr(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            self._idle.set()

    def _keep_on(self, scratch: Path) -> None:
        for left in self._run_dir.glob(f"attempts/*/{scratch.name}"):
            shutil.rmtree(left, ignore_errors=True)
        wait_s, done = _BACK_OFF_S[0], -1
        while not self._closed.is_set():
            ending = self._finishing.is_set()  # looked at first: what was saved before it is seen below
            step = max(published(self._run_dir / "checkpoints") - self._old, default=-1)
            if step <= done:
                if ending:
                    break
                self._finishing.wait(_LOOK_S)
                continue
            try:
                self._store(step, scratch)
            except Interrupted:
                break
            except NotWhole as error:  # another try would find the same
                done = step
                self._in_loop(self._trouble, step, str(error))
            except (Away, ValueError, OSError) as error:
                self._in_loop(self._trouble, step, str(error))
                logger.warning("step %s: %s", step, error)
                if ending:
                    self._closed.wait(_BACK_OFF_S[0])
                else:
                    self._finishing.wait(wait_s)
                wait_s = min(2 * wait_s, _BACK_OFF_S[1])
            else:
                done, wait_s = step, _BACK_OFF_S[0]

    def _store(self, step: int, scratch: Path) -> None:
        """Copies one, then removes what is one too many. Links keep its files while the trainer goes on and removes it."""
        storage = Storage(self._url)
        linked = scratch / f"step-{step:08d}"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            shutil.copytree(self._run_dir / "checkpoints" / linked.name, linked, copy_function=os.link)
        except (OSError, shutil.Error):  # newer ones have replaced it
            if not (self._run_dir / "checkpoints" / linked.name).exists():
                return
            raise
        there = place(self._claim.stored_as, self._claim.attempt, step)
        with contextlib.suppress(FileNotFoundError):
            storage.put_tokenizer((self._run_dir / TOKENIZER).read_bytes(), there)
        sha256 = storage.put(linked, there, lambda: not self._closed.is_set())
        if self._closed.is_set():
            raise Interrupted
        self._held = [*self._held, Held(attempt=self._claim.attempt, step=step, sha256=sha256, place=there)]
        self._in_loop(self._stored)
        if self._current():
            self._prune(storage)

    def _prune(self, storage: Storage) -> None:
        """The rule of the disk: the newest `keep_checkpoints` stay; with the attempt's first copy what older attempts left half done goes too."""
        surplus, self._held = self._held[: -self._keep], self._held[-self._keep :]
        doomed = [held.place for held in surplus if held.place]
        if surplus:
            self._in_loop(self._stored)
        try:
            if not self._swept:
                kept = {held.place for held in self._held}
                doomed += [left for left in storage.places(self._claim.stored_as, self._claim.attempt) if left not in kept and left not in doomed]
                self._swept = True
            for one in doomed:
                if self._closed.is_set() or not self._current():
                    return
                storage.remove(one)
        except Away as error:  # it takes room, and no harm is done
            logger.warning("%s is not removed: %s", doomed, error)

    def _in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody to tell
            self._loop.call_soon_threadsafe(function, *arguments)

    # ----- what is said

    def _stored(self) -> None:
        if self._said:
            self._say(f"checkpoints are stored again in {self._url}")
        self._problem, self._said = None, ""
        self._report()

    def _trouble(self, step: int, why: str, so: str = "training does not wait for it") -> None:
        self._problem = (step, why[:500])
        if why != self._said:
            self._said = why
            self._say(f"the checkpoint of step {step} could not be stored in {self._url}: {why}; {so}")
        self._report()

    def _report(self) -> None:
        """All that the storage has of the run, and why the newest checkpoint is not there."""
        checkpoints = [{"attempt": one.attempt, "step": one.step, "sha256": one.sha256} for one in self._held]
        problem = self._problem and {"step": self._problem[0], "detail": self._problem[1]}
        self._tell({"type": "stored", "storage": self._url, "checkpoints": checkpoints, "problem": problem})
