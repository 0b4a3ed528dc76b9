"""How an attempt ended, from how its ranks ended (exit codes: docs/protocol.md, section 2)."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Outcome = Literal["succeeded", "failed", "cancelled", "paused"]

STOPPED, PEER_LOST = 75, 77
_REASON_OF_CODE = {64: "config_invalid", 70: "error", 71: "oom", 74: "disk_full", 76: "nan_loss", 77: "peer_lost"}
_STOPPING = frozenset({0, STOPPED, -signal.SIGTERM, -signal.SIGKILL})
# The last words of torch's NCCL watchdog where another rank is gone or does not come: what it throws then ends the process by SIGABRT
# (TORCH_NCCL_ASYNC_ERROR_HANDLING, 3 unless somebody says otherwise). With an error of this rank's own device it says "CUDA error".
_PEER_GONE = re.compile(
    "watchdog thread terminated with exception: .*(remote process exited|unhandled system error|collective operation timeout)"
    "|dump signal due to a collective timeout from +rank "
)


def says_peer_gone(line: str) -> bool:
    """Whether a rank that prints this and aborts does so because it has lost another one."""
    return _PEER_GONE.search(line) is not None


class Exit(NamedTuple):
    """The end of one rank; `code` is negative for a signal. `by_us`: it was still alive when its supervisor killed it."""

    rank: int
    code: int
    by_us: bool = False


class Verdict(NamedTuple):
    """The fields of RunEnded."""

    outcome: Outcome
    reason: str
    detail: str
    exit_code: int | None = None
    signal: int | None = None


def told_by_trainer(path: Path) -> dict[str, Any] | None:
    """What the trainer's result.json at `path` says; None where it has left none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def judge(
    exits: Sequence[Exit],
    *,
    asked: Literal["run", "cancel", "pause"],
    hang: str = "",
    oom_killed: bool = False,
    result: Mapping[str, Any] | None = None,
    last_line: str = "",
    last_words: Mapping[int, str] | None = None,
) -> Verdict:
    """The verdict on ranks that ended in the order of `exits`.

    Ranks that stop when nobody asked the run to (their host goes down) leave it `paused` for reason `worker_stopped`: the server,
    which wants it to run, queues it again. `hang` says what stood still, `oom_killed` that the kernel killed somebody for memory;
    `result` is the trainer's own result.json, `last_line` the log's last line; `last_words` are those by which ranks said that a peer is gone.
    """
    aborted = {end.rank: words for end in exits if end.code == -signal.SIGABRT and (words := (last_words or {}).get(end.rank))}
    # Whoever went for a reason of its own comes before those that fail because another is gone, and these before those that we killed.
    failures = sorted(
        (end for end in exits if end.code not in (0, STOPPED)),
        key=lambda end: (end.by_us and not oom_killed, end.code == PEER_LOST or end.rank in aborted),
    )
    first = next(iter(failures or exits), Exit(0, STOPPED))
    code, number = (first.code, None) if first.code >= 0 else (None, -first.code)
    codes = {end.code for end in exits}
    told = str((result or {}).get("detail") or "")
    if hang:
        return Verdict("failed", "hang", hang, code, number)
    if codes == {0}:
        return Verdict("succeeded", "finished", told, 0)
    if asked == "cancel" or (asked == "pause" and codes <= _STOPPING):
        forced = "did not stop in time and was killed; it goes back to its newest checkpoint" if -signal.SIGKILL in codes else ""
        ended: Outcome = "cancelled" if asked == "cancel" else "paused"
        return Verdict(ended, ended, forced or told, code, number)
    if codes <= {0, STOPPED}:
        return Verdict("paused", "worker_stopped", "its host asked it to stop; the next worker continues it", code, number)
    if number is not None:
        if number == signal.SIGKILL and oom_killed:
            return Verdict("failed", "oom", f"rank {first.rank} was killed by the kernel: the host ran out of memory", None, number)
        if first.rank in aborted:
            return Verdict("failed", "peer_lost", f"rank {first.rank} has lost another rank: {aborted[first.rank]}", None, number)
        return Verdict("failed", "rank_killed", f"rank {first.rank} was ended by {_name(number)}", None, number)
    reason = _REASON_OF_CODE.get(first.code, "error")
    if first.rank != 0 and (result or {}).get("reason") != reason:
        told = ""  # the trainer's words are rank 0's, which had another reason
    return Verdict("failed", reason, told or last_line or f"rank {first.rank} exited with code {first.code}", code, None)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
