"""A spool loses nothing that was whole: cut at any byte, flipped anywhere, read while it is written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.spool import MAGIC, MAX_RECORD_BYTES, Reader, SpoolError, Writer

PAYLOADS = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def write(path: Path, payloads: list[bytes]) -> None:
    with Writer(path) as writer:
        assert [writer.append(payload) for payload in payloads] == list(range(1, len(payloads) + 1))


def read(path: Path, after_seq: int = 0) -> list[bytes]:
    """Payloads; their numbers are checked here."""
    with Reader(path, after_seq) as reader:
        records = reader.read()
    assert [seq for seq, _ in records] == list(range(after_seq + 1, after_seq + 1 + len(records)))
    return [payload for _, payload in records]


def ends(payloads: list[bytes]) -> list[int]:
    """Offset after each record."""
    offsets = [len(MAGIC)]
    for payload in payloads:
        offsets.append(offsets[-1] + 8 + len(payload))
    return offsets


def test_cut_at_every_byte_the_whole_records_remain_and_writing_goes_on(tmp_path: Path) -> None:
    payloads = [b"one", b"\0" * 9, b"three" * 5, b"4"]
    whole = tmp_path / "whole"
    write(whole, payloads)
    data, offsets = whole.read_bytes(), ends(payloads)
    for cut in range(len(data) + 1):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(data[:cut])
        kept = [payload for payload, end in zip(payloads, offsets[1:], strict=True) if end <= cut]
        assert read(path) == kept
        with Writer(path) as writer:
            assert writer.last_seq == len(kept)
            assert writer.append(b"next") == len(kept) + 1
        assert read(path) == [*kept, b"next"]
        assert path.stat().st_size == offsets[len(kept)] + 8 + 4


@settings(max_examples=150, deadline=None)
@given(PAYLOADS, st.data())
def test_a_flipped_bit_costs_the_records_from_it_on_and_no_other(payloads: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "spool"
        write(path, payloads)
        raw, offsets = bytearray(path.read_bytes()), ends(payloads)
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
        if place < len(MAGIC):
            for use in (Writer, lambda path: Reader(path).read()):
                with pytest.raises(SpoolError, match="is not a spool"):
                    use(path)
            return
        kept = [payload for payload, end in zip(payloads, offsets[1:], strict=True) if end <= place]
        assert read(path) == kept
        with Writer(path) as writer:
            assert writer.append(b"next") == len(kept) + 1
        assert read(path) == [*kept, b"next"]


@settings(max_examples=100, deadline=None)
@given(PAYLOADS, st.binary(max_size=64))
def test_any_tail_is_cut_and_never_raises(payloads: list[bytes], tail: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "spool"
        write(path, payloads)
        with path.open("ab") as file:
            file.write(tail)
        assert read(path)[: len(payloads)] == payloads
        with Writer(path) as writer:
            seq = writer.append(b"next")
        assert read(path)[seq - 1 :] == [b"next"]


def test_blocks_of_zeros_after_a_crash_are_no_records(tmp_path: Path) -> None:
    write(tmp_path / "spool", [b"a"])
    with (tmp_path / "spool").open("ab") as file:
        file.write(b"\0" * 4096)
    assert read(tmp_path / "spool") == [b"a"]
    with Writer(tmp_path / "spool") as writer:
        assert writer.last_seq == 1


@settings(max_examples=100, deadline=None)
@given(PAYLOADS, st.integers(0, 10), st.integers(1, 5), st.integers(1, 100))
def test_reading_resumes_after_any_number_in_batches_of_any_size(payloads: list[bytes], after: int, most: int, most_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "spool"
        write(path, payloads)
        found: list[tuple[int, bytes]] = []
        with Reader(path, after) as reader:
            while batch := reader.read(most, most_bytes):
                assert len(batch) <= most
                assert len(batch) == 1 or sum(len(payload) for _, payload in batch[:-1]) < most_bytes
                found += batch
        assert found == [(seq, payload) for seq, payload in enumerate(payloads, 1) if seq > after]


def test_a_reader_may_come_before_the_file_and_sees_records_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "spool"
    with Reader(path) as reader:
        assert reader.read() == []
        path.parent.mkdir()
        path.write_bytes(MAGIC[:3])
        assert reader.read() == []
        with Writer(path) as writer:
            for seq in range(1, 50):
                writer.append(b"%d" % seq)
                assert reader.read() == [(seq, b"%d" % seq)]
                assert reader.read() == []


def _append(path: Path, count: int) -> None:
    with Writer(path) as writer:
        for index in range(count):
            writer.append(b"%06d" % index * (1 + index % 500))


def test_another_process_tails_a_spool_without_a_gap_or_a_torn_record(tmp_path: Path) -> None:
    path, count = tmp_path / "spool", 3000
    child = multiprocessing.get_context("spawn").Process(target=_append, args=(path, count))
    child.start()
    found: list[tuple[int, bytes]] = []
    until = time.monotonic() + 30
    with Reader(path) as reader:
        while len(found) < count and time.monotonic() < until:
            found += reader.read(max_records=97)
            time.sleep(0.001)
    child.join()
    assert found == [(index + 1, b"%06d" % index * (1 + index % 500)) for index in range(count)]


def test_killed_at_any_moment_what_was_appended_is_there(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from spec.spool import Writer
        with Writer(Path(sys.argv[1])) as writer:
            seq = 0
            while True:
                seq = writer.append(b"x" * (1 + seq * 7919 % 5000))
                print(seq, flush=True)
    """
    path, expected = tmp_path / "spool", 0
    for moment in range(5):
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            told = int(line)
            if told >= expected + 20 + moment * 37:
                os.kill(child.pid, signal.SIGKILL)
                break
        rest = child.stdout.read().split()
        child.wait()
        told = int(rest[-1]) if rest else told
        with Writer(path) as writer:
            assert told <= writer.last_seq <= told + 1
            expected = writer.last_seq
        with Reader(path) as reader:
            assert sum(1 for _ in reader.read(10**9, 10**12)) == expected


def test_a_full_disk_leaves_a_whole_tail(tmp_path: Path) -> None:
    """The file-size limit stands for the disk: the kernel writes what fits, then fails."""
    path = tmp_path / "spool"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Writer(path) as writer:
            writer.append(b"first")
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            with pytest.raises(OSError) as caught:
                writer.append(b"y" * 200)
            assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert writer.append(b"second") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read(path) == [b"first", b"second"]


def test_empty_and_huge_records_are_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "spool") as writer:
        for payload in (b"", bytes(MAX_RECORD_BYTES + 1)):
            with pytest.raises(SpoolError, match=f"not within 1 and {MAX_RECORD_BYTES}"):
                writer.append(payload)
        assert writer.append(b"x") == 1


def test_another_kind_of_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"this is a log, not a spool")
    with pytest.raises(SpoolError):
        Writer(path)
    assert path.read_bytes() == b"this is a log, not a spool"


def test_a_spool_is_for_its_owner_alone(tmp_path: Path) -> None:
    write(tmp_path / "spool", [b"x"])
    assert (tmp_path / "spool").stat().st_mode & 0o077 == 0
