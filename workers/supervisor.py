"""Owns one attempt at a run, from the start of its ranks until the server knows how it ended.

    python -m workers.supervisor RUN_DIR        with the claim as JSON on stdin; returns at once, the supervisor goes on alone

It needs no server to go on: training writes to the spool, and what was not acknowledged is sent when the server is back.
It kills its ranks and leaves only when it is told that a later attempt exists. When it dies, its ranks die with it.
Of the supervisors of a run on several hosts, node 0's ships and judges; the others tell the server how their ranks ended, also where
the attempt was ended before they could. When node 0 sees that the ranks stand still, each has the stacks of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

from moelab.outbox import Outbox, outboxes
from moelab.shipper import Denied, Fenced, Shipper
from spec import events, spool
from workers.bring import UNREACHABLE, NotBrought, Porter
from workers.claim import Claim
from workers.company import Company, left
from workers.detach import detach
from workers.host import AttemptLock, Holder, LockedError, end_attempt, identity, put_aside
from workers.keeper import Keeper
from workers.linux import become_subreaper, oom_kills
from workers.meeting import NoMeeting
from workers.progress import Progress
from workers.ranks import ORIGIN, Ranks
from workers.runlog import RunLog
from workers.storage import storage_url
from workers.verdict import STOPPED, Verdict, judge, told_by_trainer

GRACE_S = 10.0
SURVIVORS_S = 3.0
STACKS_S = 2.0
"""How long ranks that stand still have to write their stacks; those of node 0 live until the others have heard of it, too."""
HEARD_S = 3.0
STRAGGLERS_S = 60.0
CONFIRMED_S = 5.0
"""How old the server's last word may be when something is removed from the storage: heartbeats are answered every 3 s, and a lease is 15 s."""
FIRST_STEP_S = float(os.environ.get("MOELAB_FIRST_STEP_TIMEOUT_S", "300"))
STEP_S = float(os.environ.get("MOELAB_STEP_TIMEOUT_S", "120"))
_LOOK_S = 0.1
_RESERVE_BYTES = 256 * 1024

logger = logging.getLogger("workers.supervisor")


class Supervisor:
    """One attempt. `run()` is its life."""

    def __init__(self, claim: Claim, run_dir: Path, lock: AttemptLock) -> None:
        self._claim, self._run_dir, self._lock = claim, run_dir, lock
        self._dir = run_dir / "attempts" / str(claim.attempt)
        self._holder = Holder(claim.run, claim.attempt, identity(os.getpid()), list(claim.devices))
        self._log = RunLog(self._dir / "log.txt", len(claim.devices), first_rank=claim.first_rank, alone=claim.nodes == 1)
        self._ranks = Ranks(self._log, claim.first_rank)
        self._progress = Progress(self._dir / "events.spool", time.monotonic(), FIRST_STEP_S, STEP_S)
        self._shipper = Shipper(
            claim.socket_url,
            claim.token,
            outboxes(run_dir / "attempts", claim.attempt) if claim.node == 0 else [Outbox(claim.attempt, self._dir / "events.spool")],
            log=self._dir / "log.txt",
            on_command=self._hear,
            on_hosts=self._hear_of_hosts,
        )
        self._storage = storage_url() if claim.stored_as and claim.node == 0 else ""
        self._keeper: Keeper | None = None
        if self._storage:
            self._keeper = Keeper(claim, run_dir, self._storage, say=self._log.say, tell=self._shipper.say, current=self._is_current)
        self._company = Company(claim)
        self._asked: Literal["run", "cancel", "pause"] = "run"
        self._checkpoints_asked = self._checkpoints_sent = 0
        self._kill_at: float | None = None
        self._leave_by = math.inf
        self._hang = ""
        self._server_knows_of_hangs = False
        self._unkillable = False
        self._memory_kills = oom_kills()
        self._memory_killed = False
        self._memory_looked_at = 0.0

    async def run(self) -> None:
        """Trains, ships, and tells how it ended. Returns early where the attempt is fenced."""
        shipping = asyncio.create_task(self._shipper.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._go_down, shipping)
        try:
            verdict = await self._train(shipping)
            if verdict is not None:
                await self._tell(verdict, shipping)
                await shipping
        except Fenced as answer:
            logger.info("fenced: %s", answer)
            await self._say_last_word(answer)
        except asyncio.CancelledError:
            logger.info("the host goes down; what was not shipped stays in the spool")
        finally:
            if self._keeper is not None:
                self._keeper.close()
            self._ranks.kill()
            shipping.cancel()

    async def _train(self, shipping: asyncio.Task[None]) -> Verdict | None:
        """Runs the ranks to their end; None if the attempt was fenced meanwhile."""
        try:
            await self._begin(shipping)
        except NoMeeting as error:
            return Verdict("failed", "no_meeting", str(error))
        except NotBrought as error:
            if self._goes_on(shipping):
                return Verdict("paused", UNREACHABLE, str(error))
        except OSError as error:
            self._ranks.kill()
            return Verdict("failed", "disk_full" if error.errno == 28 else "error", f"the ranks could not be started: {error}")
        if not self._ranks.pids:
            return self._company.lost or self._judge()
        while self._ranks.alive and not self._unkillable:
            await asyncio.sleep(_LOOK_S)
            if shipping.done():
                self._ranks.kill()
                await shipping
                return None
            self._look(time.monotonic())
        self._kill()
        self._ranks.close()
        if self._unkillable:  # its devices stay taken as long as it lives
            return Verdict("failed", "unkillable", "a process of this run cannot be killed; its host needs a look")
        self._holder.devices, self._holder.ranks = [], []
        self._lock.write(self._holder)
        shutil.rmtree(self._run_dir / ORIGIN, ignore_errors=True)
        if self._keeper is not None:
            await self._keeper.finish(
                wanted=lambda: not shipping.done() and time.monotonic() < self._leave_by,
                hurried=lambda: self._asked == "cancel" or self._goes_down,
            )
        if shipping.done():
            await shipping
            return None
        return await self._company.judge(self._judge(), wanted=lambda: not shipping.done())

    async def _begin(self, shipping: asyncio.Task[None]) -> None:
        for older in range(1, self._claim.attempt):
            lock = self._dir.parent / str(older) / "attempt.lock"
            if not await asyncio.to_thread(end_attempt, lock):
                raise OSError(f"attempt {older} does not end, and would write to the same checkpoints")
        (self._run_dir / "spec.json").write_text(json.dumps(self._claim.spec, indent=1))

        def wanted() -> bool:
            return self._goes_on(shipping)

        if self._claim.node == 0:
            await Porter(self._claim, self._run_dir, self._storage, say=self._log.say, tell=self._shipper.say, wanted=wanted).bring()
        if not wanted():
            return
        with (self._dir / "reserve").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
        meeting = None
        if self._claim.nodes > 1:
            meeting = await self._company.meet(self._shipper, wanted)
            if meeting is None:
                return
        self._ranks.start(self._run_dir, self._claim.attempt, self._claim.devices, self._claim.threads(), self._lock.fd, meeting)
        if meeting is not None:
            meeting.close()
        if self._keeper is not None:
            self._keeper.start()
        self._holder.ranks = [identity(pid) for pid in self._ranks.pids]
        self._lock.write(self._holder)

    def _goes_on(self, shipping: asyncio.Task[None]) -> bool:
        """Whether ranks that are not there yet are still to be started."""
        return self._asked == "run" and not self._goes_down and self._company.lost is None and not shipping.done()

    @property
    def _goes_down(self) -> bool:
        return self._leave_by < math.inf

    def _is_current(self) -> bool:
        return self._shipper.connected and self._shipper.heard_within(CONFIRMED_S)

    # ----- while it trains

    def _hear(self, desired: str, checkpoint_requests: int) -> None:
        """A command of the server."""
        self._checkpoints_asked = max(self._checkpoints_asked, checkpoint_requests)
        if desired in ("cancel", "pause"):
            self._asked = cast(Literal["cancel", "pause"], desired)
            self._stop()

    def _hear_of_hosts(self, place: str, lost: Mapping[str, str] | None, hanging: bool | None) -> None:
        """The server's word on the attempt's hosts. One that has failed ends it; if they stand still, we want to know where ours do."""
        self._server_knows_of_hangs = hanging is not None
        self._ranks.poll()
        if self._company.hear(place, lost, all_well_here=not self._ranks.exits and not self._hang) and self._kill_at is None:
            self._kill_at = time.monotonic() + SURVIVORS_S
        if hanging and self._claim.node and not self._hang and self._ranks.alive:
            self._end_hang("node 0 has no sign of progress; the stacks of this host's ranks are at the end of its log", STACKS_S, stacks=True)

    def _stop(self) -> None:
        """Asks the ranks for a checkpoint and their end; those that live after GRACE_S are killed."""
        if self._kill_at is None and self._ranks.alive:
            self._kill_at = time.monotonic() + GRACE_S
            self._ranks.signal(signal.SIGTERM)

    def _go_down(self, shipping: asyncio.Task[None]) -> None:
        """This host asks us to end: the run goes on elsewhere or later, so there is little time for the network, half of it for the last copy."""
        self._leave_by = min(self._leave_by, time.monotonic() + GRACE_S + SURVIVORS_S / 2)
        self._stop()
        asyncio.get_running_loop().call_later(GRACE_S + SURVIVORS_S, shipping.cancel)

    def _look(self, now: float) -> None:
        self._ranks.poll()
        self._progress.look(now)
        # Before RunStarted the trainer has no handler, and the signal would end it.
        if self._checkpoints_asked > self._checkpoints_sent and self._progress.started:
            self._checkpoints_sent = self._checkpoints_asked
            self._ranks.signal(signal.SIGUSR1)
        if self._kill_at is None:
            self._notice_trouble(now)
        elif now >= self._kill_at:
            self._kill()

    def _kill(self) -> None:
        self._unkillable = not self._ranks.kill()

    def _notice_trouble(self, now: float) -> None:
        if now - self._memory_looked_at > 1.0:
            kills, self._memory_looked_at = oom_kills(), now
            self._memory_killed, self._memory_kills = kills > self._memory_kills, kills
        if self._ranks.exits:
            failed = any(end.code not in (0, STOPPED) for end in self._ranks.exits)
            self._kill_at = now + (SURVIVORS_S if failed else STRAGGLERS_S)
            return
        silent_s = self._progress.silent_too_long(now) if self._claim.node == 0 else None  # the spool is node 0's
        if silent_s is not None:
            silence = f"no sign of progress for {silent_s:.0f} s"
            if not self._progress.started:
                self._end_hang(f"{silence} since it was started", STACKS_S, stacks=False)  # it has no handler for the signal yet
            elif self._claim.nodes == 1:
                self._end_hang(f"{silence}; the stacks of all ranks are at the end of the log", STACKS_S, stacks=True)
            elif not self._server_knows_of_hangs:  # an older one takes the word for malformed, and would never hear how it ended
                self._end_hang(f"{silence}; the stacks of this host's ranks are at the end of its log", STACKS_S, stacks=True)
            else:
                self._shipper.say({"type": "hanging"})
                where = "the stacks of each host's ranks are in the log, and kept with that host"
                self._end_hang(f"{silence}; {where}", HEARD_S + STACKS_S, stacks=True)

    def _end_hang(self, said: str, seconds: float, *, stacks: bool) -> None:
        """Kills the ranks in `seconds`, during which they write their stacks."""
        self._hang, self._kill_at = said, time.monotonic() + seconds
        self._log.say(said)
        if stacks:
            self._log.make_room()
            self._ranks.signal(signal.SIGUSR2)

    # ----- when it is over

    def _judge(self) -> Verdict:
        return judge(
            self._ranks.exits,
            asked=self._asked,
            hang=self._hang,
            oom_killed=self._memory_killed or oom_kills() > self._memory_kills,
            result=told_by_trainer(self._dir / "result.json"),
            last_line=self._log.last_line,
            last_words=self._log.last_words,
        )

    async def _tell(self, verdict: Verdict, shipping: asyncio.Task[None]) -> None:
        """Appends RunEnded to the spool, as soon as the disk takes it, and lets the shipper finish. Another node says its last word."""
        if self._claim.node:
            logger.info("%s", verdict)
            self._shipper.leave(left(verdict, self._log.tail))
            return
        event = events.RunEnded(
            at=time.time(),
            outcome=verdict.outcome,
            reason=verdict.reason,
            detail=verdict.detail[:4000],
            exit_code=verdict.exit_code,
            signal=verdict.signal,
            log_tail=self._log.tail,
        )
        logger.info("%s", verdict)
        (self._dir / "reserve").unlink(missing_ok=True)
        while not shipping.done():
            try:
                with spool.Writer(self._dir / "events.spool") as writer:
                    last = writer.append(events.encode(event))
                    writer.sync()
                self._shipper.finish(last)
                return
            except OSError as error:
                logger.warning("the spool does not take the last event: %s", error)
                await asyncio.sleep(5)

    async def _say_last_word(self, answer: Fenced) -> None:
        """How the ranks of a node ended that was fenced before it had said so."""
        if not self._claim.node or self._shipper.word_noted or isinstance(answer, Denied):
            return
        self._kill()
        self._ranks.close()
        self._holder.devices, self._holder.ranks = [], []
        self._lock.write(self._holder)
        of_their_own = self._hang or any(not end.by_us for end in self._ranks.exits)
        await self._company.say_last_word(self._dir, left(self._judge() if of_their_own else None, self._log.tail))


def main(arguments: list[str]) -> int:
    """Takes the lock, lets the caller go, and supervises. Exit codes: 0 done or detached, 2 wrong use, 3 somebody has the attempt."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    claim, run_dir = Claim.model_validate_json(sys.stdin.buffer.read()), Path(arguments[0]).absolute()
    attempt_dir = run_dir / "attempts" / str(claim.attempt)
    os.umask(0o077)
    put_aside(run_dir, claim.attempt)
    try:
        lock = AttemptLock(attempt_dir)
    except LockedError as error:
        print(error, file=sys.stderr)
        return 3
    if os.fork():
        os._exit(0)  # the lock stays with the child
    detach(attempt_dir / "supervisor.log")
    become_subreaper()
    try:
        asyncio.run(Supervisor(claim, run_dir, lock).run())
    except Exception:
        logger.exception("the supervisor failed")
        return 1
    finally:
        with contextlib.suppress(OSError):
            (attempt_dir / "reserve").unlink(missing_ok=True)
            lock.path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
