"""Brings what a run goes on from, or begins with, to this host before its ranks start: from the storage that hosts share, where it is not here.

A checkpoint that lies here is taken if it is the very same (by the SHA-256 of its manifest), or newer and of the attempt that trained last: a
host that was away may hold checkpoints of a past that the run has left, and those are put aside.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workers.adopt import adopt
from workers.claim import Claim, Held, Start
from workers.disk import manifests
from workers.fetch import AWAY, DISK_FULL, NOT_WHOLE, THERE, Fetch, Wanted
from workers.ranks import ORIGIN

PATIENCE_S = float(os.environ.get("MOELAB_FETCH_PATIENCE_S", "60"))
"""How long a storage that is away is asked again before the attempt ends."""
STANDSTILL_S = max(PATIENCE_S, 10.0)
"""How long a fetch may write nothing; its libraries alone take seconds to load."""
UNREACHABLE = "checkpoint_unreachable"
_LOOK_S = 0.05


class NotBrought(Exception):  # noqa: N818
    """It is not here, and could not be fetched: the run is to be queued again, without a try being counted."""


class Porter:
    """Of one claim. `say` takes a line for the log, `tell` a message for the server; `wanted` says whether anybody still waits."""

    def __init__(
        self,
        claim: Claim,
        run_dir: Path,
        url: str,
        *,
        say: Callable[[str], None],
        tell: Callable[[Mapping[str, Any]], None],
        wanted: Callable[[], bool],
    ) -> None:
        self._claim, self._run_dir, self._url, self._say, self._tell, self._wanted = claim, run_dir, url, say, tell, wanted

    async def bring(self) -> None:
        """What the run has of its own, else what it begins from. Raises NotBrought, or OSError where another run's lies here and cannot be had."""
        claim, own = self._claim, self._run_dir / "checkpoints"
        stored = [held for held in claim.checkpoints if held.place] if self._url else []
        if stored:
            await self._go_on(max(stored, key=lambda held: held.age))
        if claim.resume_from is not None and not manifests(own):
            await self._take_over(claim.resume_from)
        if claim.start is not None and claim.start.place and self._url and not manifests(own):
            await self._begin_with(claim.start)

    async def _go_on(self, newest: Held) -> None:
        own = self._run_dir / "checkpoints"
        here, known = manifests(own), {(held.step, held.sha256): held.age for held in self._claim.checkpoints}
        good = {}
        for step, sha256 in here.items():
            age = known.get((step, sha256)) or (_attempt_of(own, step), step)
            if (step, sha256) in known or age[0] >= max(1, self._claim.trained):
                good[step] = age
        best = max(good.values(), default=(0, -1))
        if best < newest.age:
            assert newest.place is not None
            _put_aside(own, newest.step)
            await self._fetch(newest.place, newest.sha256, self._run_dir)
            best = newest.age
        for step in here:
            if step > best[1] or (step < best[1] and step not in good):
                _put_aside(own, step)

    async def _take_over(self, start: Start) -> None:
        there = manifests(self._run_dir.parent / str(start.run) / "checkpoints").get(start.step)
        if start.place and self._url and there != start.sha256:
            await self._fetch(start.place, start.sha256, self._run_dir)
        else:
            adopt(self._run_dir, start)

    async def _begin_with(self, start: Start) -> None:
        """The trainer looks into ORIGIN first."""
        there = manifests(self._run_dir.parent / str(start.run) / "checkpoints").get(start.step)
        origin = self._run_dir / ORIGIN
        if start.place and there != start.sha256 and manifests(origin / "checkpoints").get(start.step) != start.sha256:
            shutil.rmtree(origin, ignore_errors=True)
            await self._fetch(start.place, start.sha256, origin)

    async def _fetch(self, place: str, sha256: str, into: Path) -> None:
        """Fetches, again and again while the storage is away. Of one that is not whole the server hears before anybody asks for it again."""
        began, wait_s = time.monotonic(), 1.0
        while True:
            code, words = await self._once(Wanted(place=place, sha256=sha256, run_dir=into, set_aside=True))
            if code == THERE:
                self._say(f"{place} was fetched from {self._url} in {time.monotonic() - began:.1f} s")
                return
            if code == NOT_WHOLE:
                self._tell({"type": "damaged", "storage": self._url, "place": place, "detail": f"what was stored is damaged: {words}"})
            if code in (NOT_WHOLE, DISK_FULL) or time.monotonic() - began > PATIENCE_S or not await self._still_wanted(wait_s):
                raise NotBrought(f"{place} could not be fetched from {self._url}: {words}")
            wait_s = min(2 * wait_s, 15.0)

    async def _still_wanted(self, seconds: float) -> bool:
        """True after that time; False as soon as nobody waits any more."""
        until = time.monotonic() + seconds
        while self._wanted() and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        return self._wanted()

    async def _once(self, wanted: Wanted) -> tuple[int, str]:
        """The exit code and last line of a fetch; AWAY for one that is ended, because it stands still or nobody waits for it."""
        fetching = Fetch(wanted)
        try:
            written, moved = 0, time.monotonic()
            while (code := fetching.process.poll()) is None:
                now, before, written = time.monotonic(), written, fetching.written
                moved = now if written != before else moved
                if now - moved > STANDSTILL_S:
                    return AWAY, f"the storage hangs: nothing came for {now - moved:.0f} s, after {written} bytes"
                if not await self._still_wanted(_LOOK_S):
                    return AWAY, "nobody waits for it any more"
            return code, fetching.words
        finally:
            await asyncio.to_thread(fetching.close)  # the server wants to hear of us meanwhile


def _attempt_of(checkpoints: Path, step: int) -> int:
    """Which attempt has saved a checkpoint that lies here; 0 where it does not say."""
    try:
        return int(json.loads((checkpoints / f"step-{step:08d}" / "state.json").read_text())["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _put_aside(checkpoints: Path, step: int) -> None:
    path = checkpoints / f"step-{step:08d}"
    if path.exists():
        aside = path.with_name(f"{path.name}.left")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
