"""The other hosts of an attempt, as this one hears of them through the server: where the ranks meet, and which host has failed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moelab.outbox import Outbox
from moelab.shipper import Fenced, Shipper
from workers.claim import Claim
from workers.meeting import Meeting
from workers.verdict import Verdict

OTHERS_S = 40.0
"""How long node 0, whose ranks have lost another host's, waits to hear why: longer than a lease and a round of the reconciler."""
LAST_WORD_S = 10.0
PEER_LOST = "peer_lost"
_LOOK_S = 0.1


class Company:
    """Nobody, where the run is on one host."""

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._place = ""
        self.lost: Verdict | None = None
        """What another host's failure makes of the attempt, once node 0 has heard of one."""
        self._lost_first = False

    def hear(self, place: str, lost: Mapping[str, str] | None, *, all_well_here: bool) -> bool:
        """What the server says of the hosts; True if the attempt cannot go on. Ending it is node 0's alone."""
        self._place = place or self._place
        if lost is None or self.lost is not None or self._claim.node:
            return False
        self.lost, self._lost_first = Verdict("failed", lost["reason"], lost["detail"]), all_well_here
        return True

    async def meet(self, shipper: Shipper, wanted: Callable[[], bool]) -> Meeting | None:
        """Where the ranks of all hosts meet: node 0 says so, the others wait while it is `wanted`. Raises NoMeeting."""
        if self._claim.node == 0:
            meeting = Meeting.called(self._claim.nodes)
            shipper.say({"type": "rendezvous", "at": meeting.place})
            return meeting
        while not self._place and wanted():
            await asyncio.sleep(_LOOK_S)
        return Meeting(self._claim.nodes, self._place) if self._place else None

    async def judge(self, verdict: Verdict, wanted: Callable[[], bool]) -> Verdict:
        """Our ranks' verdict, or the other host's where that came first, or where our ranks only noticed that theirs were gone."""
        if self._claim.nodes == 1 or self._claim.node or verdict.outcome != "failed":
            return verdict
        deadline = time.monotonic() + OTHERS_S
        while verdict.reason == PEER_LOST and self.lost is None and wanted() and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
        return self.lost if self.lost is not None and (self._lost_first or verdict.reason == PEER_LOST) else verdict

    async def say_last_word(self, attempt_dir: Path, word: Mapping[str, Any]) -> None:
        """Says `word` of an attempt that is over, behind the rest of the log. Nobody waits for it, so there is little time."""
        own = Outbox(self._claim.attempt, attempt_dir / "events.spool")
        shipper = Shipper(self._claim.last_word_url, self._claim.token, [own], log=attempt_dir / "log.txt")
        shipper.leave(word)
        with contextlib.suppress(Fenced, TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                await shipper.run()


def left(verdict: Verdict | None, log_tail: str) -> dict[str, Any]:
    """The last word of a node; without a verdict its ranks ended because we killed them when the attempt was over."""
    said = verdict._asdict() if verdict else {"outcome": "stopped", "reason": "", "detail": ""}
    return {"type": "left", **said, "detail": said["detail"][:4000], "log_tail": log_tail}
