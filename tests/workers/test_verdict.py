"""Exit codes and signals to outcome and reason."""

from __future__ import annotations

import pytest

from workers.verdict import Exit, judge, says_peer_gone


@pytest.mark.parametrize(
    ("codes", "asked", "expected"),
    [
        ([0, 0], "run", ("succeeded", "finished", 0, None)),
        ([0, 0], "cancel", ("succeeded", "finished", 0, None)),
        ([75, 75], "cancel", ("cancelled", "cancelled", 75, None)),
        ([75, 75], "pause", ("paused", "paused", 75, None)),
        ([-15, -15], "pause", ("paused", "paused", None, 15)),
        ([75, 75], "run", ("paused", "worker_stopped", 75, None)),
        ([-9, 70], "run", ("failed", "rank_killed", None, 9)),
        ([70, -9], "run", ("failed", "error", 70, None)),
        ([0, 71], "run", ("failed", "oom", 71, None)),
        ([76], "pause", ("failed", "nan_loss", 76, None)),
        ([74], "pause", ("failed", "disk_full", 74, None)),
        ([70], "cancel", ("cancelled", "cancelled", 70, None)),
        ([64], "run", ("failed", "config_invalid", 64, None)),
        ([-11], "run", ("failed", "rank_killed", None, 11)),
        ([1], "run", ("failed", "error", 1, None)),
        ([77, -9], "run", ("failed", "rank_killed", None, 9)),
        ([77, 71], "run", ("failed", "oom", 71, None)),
        ([77, 77], "run", ("failed", "peer_lost", 77, None)),
        ([77, 75], "cancel", ("cancelled", "cancelled", 77, None)),
    ],
)
def test_how_the_ranks_ended_decides(codes: list[int], asked: str, expected: tuple[str, str, int | None, int | None]) -> None:
    verdict = judge([Exit(rank, code) for rank, code in enumerate(codes)], asked=asked)  # type: ignore[arg-type]
    assert (verdict.outcome, verdict.reason, verdict.exit_code, verdict.signal) == expected


def test_the_kernels_kill_for_memory_is_told_from_any_other() -> None:
    assert judge([Exit(0, -9)], asked="run", oom_killed=True).reason == "oom"
    assert judge([Exit(0, -11)], asked="run", oom_killed=True).reason == "rank_killed"


WATCHDOG = "Process group watchdog thread terminated with exception: "
REMOTE = f"[rank1]:[E1128 13:00:00.1 ProcessGroupNCCL.cpp:2057] [PG ID 0 PG GUID 0 Rank 1] {WATCHDOG}NCCL error: remote process exited or there was a"


@pytest.mark.parametrize(
    ("line", "gone"),
    [
        (f"{REMOTE} network error, NCCL version 2.27.5", True),
        (f"  what():  [Rank 1] NCCL {WATCHDOG[14:]}NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)", True),
        (f"{WATCHDOG}[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 300008 milliseconds", True),
        ("[Rank 6] Received a dump signal due to a collective timeout from  rank 7 and we will try our best", True),
        ("[Rank 0] Received a dump signal due to a collective timeout from this local rank and we will", False),
        (f"{WATCHDOG}CUDA error: an illegal memory access was encountered", False),
        ("NCCL error: remote process exited or there was a network error", False),
    ],
)
def test_the_watchdogs_last_words_tell_a_lost_peer_from_a_broken_device(line: str, gone: bool) -> None:
    assert says_peer_gone(line) == gone


@pytest.mark.parametrize(
    ("exits", "reason", "signal"),
    [
        ([Exit(1, -6)], "peer_lost", 6),
        ([Exit(0, -6), Exit(1, -6)], "rank_killed", 6),  # rank 0 said nothing
        ([Exit(1, -6), Exit(0, 71)], "oom", None),
        ([Exit(1, -6), Exit(0, -9)], "rank_killed", 9),
        ([Exit(1, -6), Exit(0, -9, by_us=True)], "peer_lost", 6),
        ([Exit(1, 77), Exit(0, -9, by_us=True)], "peer_lost", None),
        ([Exit(1, -11)], "rank_killed", 11),
        ([Exit(1, 0)], "finished", None),
    ],
)
def test_a_rank_that_aborts_for_a_lost_peer_is_not_the_reason(exits: list[Exit], reason: str, signal: int | None) -> None:
    verdict = judge(exits, asked="run", last_words={1: REMOTE})
    assert (verdict.reason, verdict.signal) == (reason, signal)


def test_a_rank_that_the_kernel_killed_for_memory_may_be_slow_to_die() -> None:
    exits = [Exit(1, 77), Exit(0, -9, by_us=True)]
    assert judge(exits, asked="run", oom_killed=True).reason == "oom"


def test_a_hang_is_a_hang_however_its_ranks_died() -> None:
    verdict = judge([Exit(0, -9), Exit(1, -9)], asked="run", hang="no sign of progress for 120 s")
    assert (verdict.outcome, verdict.reason, verdict.detail) == ("failed", "hang", "no sign of progress for 120 s")


def test_the_trainers_own_words_win_over_the_logs_last_line() -> None:
    assert judge([Exit(0, 70)], asked="run", result={"detail": "ValueError: x"}, last_line="bye").detail == "ValueError: x"
    assert judge([Exit(0, 70)], asked="run", last_line="ImportError: y").detail == "ImportError: y"
    assert judge([Exit(1, 70)], asked="run").detail == "rank 1 exited with code 70"
    lost = {"reason": "peer_lost", "detail": "connection reset"}
    assert judge([Exit(0, 77), Exit(1, 70)], asked="run", result=lost, last_line="KeyError: z").detail == "KeyError: z", "of another rank"
