"""The log: safe to show, whose line it is, bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers import runlog
from workers.runlog import RunLog


def written(path: Path, log: RunLog) -> str:
    log.close()
    text = path.read_text()
    assert len(path.read_bytes()) == log.size
    return text


def test_control_characters_are_written_out(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt")
    log.feed(0, "a\x1b[2Jb\x00c\td\x7f\x9b\u202eevil\n".encode())
    assert written(tmp_path / "log.txt", log) == "a\\x1b[2Jb\\x00c\td\\x7f\\x9b\\u202eevil\n"


def test_a_character_that_comes_in_two_pieces_stays_whole(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt")
    for byte in "größe\r\nnext\n".encode():
        log.feed(0, bytes([byte]))
    log.feed(0, b"\xff", last=True)
    assert written(tmp_path / "log.txt", log).replace("\n\n", "\n") == "größe\nnext\n\\xff"


def test_with_several_ranks_each_line_says_whose_it_is(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.txt", n_ranks=2)
    log.feed(0, b"half ")
    log.feed(1, b"one\ntwo\n")
    log.feed(0, b"line\nopen")
    log.feed(0, b"", last=True)
    assert written(tmp_path / "log.txt", log) == "[1] one\n[1] two\n[0] half line\n[0] open\n"
    assert log.last_line == "[0] open"


def test_a_log_stops_growing_at_its_limit_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "LIMIT_BYTES", 1000)
    log = RunLog(tmp_path / "log.txt")
    for _ in range(100):
        log.feed(0, b"x" * 99 + b"\n")
    log.feed(0, b"the end\n")
    text = written(tmp_path / "log.txt", log)
    assert len(text) < 1200 and "what follows is not kept" in text
    assert log.last_line == "the end", "the tail is kept for RunEnded"
