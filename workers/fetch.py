"""Fetches a checkpoint from the storage that hosts share: a process of its own, which can be killed whatever the storage does.

    python -m workers.fetch         with {place, sha256, run_dir} as JSON on stdin

RUN_DIR then has it among its `checkpoints`, and its tokenizer.json unless it has one. Exit codes: 0 there, 64 not asked properly or no such
storage, 66 not there or not whole (then it has been put aside), 74 this disk is full, 75 the storage is away; the last line says why.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from spec.storage import Place
from workers.linux import die_with_parent
from workers.ranks import SECRETS
from workers.storage import TOKENIZER, Away, NotWhole, Storage, storage_url, told

THERE, REFUSED, NOT_WHOLE, DISK_FULL, AWAY = 0, 64, 66, 74, 75


class Wanted(BaseModel):
    """A checkpoint by its place and the SHA-256 of its manifest, and the directory that is to have it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    place: Place
    sha256: str
    run_dir: Path


class Fetch:
    """A fetch under way, which ends with the `with` block."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises OSError."""
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
        command = [sys.executable, "-m", "workers.fetch"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env=kept,
            preexec_fn=die_with_parent(),
            start_new_session=True,
        )
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(wanted.model_dump_json().encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # its exit code says why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._said.close()

    @property
    def words(self) -> str:
        """Its last line."""
        self._said.seek(0)
        lines = self._said.read()[-4000:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {self.process.poll()}")[:500]


def fetch(wanted: Wanted) -> None:
    """Raises Away, NotWhole, ValueError, OSError."""
    storage = Storage(storage_url())
    checkpoints = wanted.run_dir / "checkpoints"
    try:
        storage.get(wanted.place, wanted.sha256, checkpoints)
        tokenizer = storage.get_tokenizer(wanted.place)
    except NotWhole:
        storage.set_aside(wanted.place)
        raise
    path = wanted.run_dir / TOKENIZER
    if tokenizer is not None and not path.exists():
        work = path.with_name(f".{TOKENIZER}")
        work.write_bytes(tokenizer)
        work.replace(path)


def main() -> int:
    os.umask(0o077)
    try:
        fetch(Wanted.model_validate_json(sys.stdin.buffer.read()))
    except NotWhole as error:
        print(error)
        return NOT_WHOLE
    except Away as error:
        print(error)
        return AWAY
    except ValidationError as error:
        print(f"{error.error_count()} fields are wrong")
        return REFUSED
    except ValueError as error:
        print(error)
        return REFUSED
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"this host's disk does not take it: {told(error)}")
        return DISK_FULL if full else AWAY
    return THERE


if __name__ == "__main__":
    sys.exit(main())
