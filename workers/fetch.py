"""Fetches a checkpoint from the storage that hosts share: a process of its own, which can be killed whatever the storage does.

    python -m workers.fetch         with {place, sha256, run_dir, set_aside} as JSON on stdin

RUN_DIR then has it among its `checkpoints`, and its tokenizer.json unless it has one. Exit codes: 0 there, 64 not asked properly or no such
storage, 66 not there or not whole (then its manifest is set aside, if that was asked), 74 this disk is full, 75 the storage is away; the last
line says why.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from spec.storage import Place
from workers.disk import half_fetched
from workers.linux import die_with_parent
from workers.manifest import NotWhole
from workers.ranks import SECRETS
from workers.storage import TOKENIZER, Away, Storage, storage_url, told

THERE, REFUSED, NOT_WHOLE, DISK_FULL, AWAY = 0, 64, 66, 74, 75
_DEATH_S = 2.0
"""How long a process that was killed is waited for: one that is stuck in the kernel dies when its mount answers, and not before."""


class Wanted(BaseModel):
    """A checkpoint by its place and the SHA-256 of its manifest, and the directory that is to have it.

    `set_aside`: one that is not whole is to look so to others as well; for whoever tells the server of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    place: Place
    sha256: str
    run_dir: Path
    set_aside: bool = False


class Fetch:
    """A fetch under way, which ends with the `with` block, or with `close`."""

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
        self._half = half_fetched(wanted.run_dir / "checkpoints", wanted.place, self.process.pid)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(wanted.model_dump_json().encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # its exit code says why

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills it, and removes what it leaves half done. Takes _DEATH_S at most: what cannot be killed is left to itself."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_DEATH_S)
            shutil.rmtree(self._half, ignore_errors=True)
        self._said.close()

    @property
    def written(self) -> int:
        """Bytes of what is half here: a number that stays the same for long is that of a storage that hangs."""
        found = 0
        with contextlib.suppress(FileNotFoundError):  # not begun, or published meanwhile
            found = sum(entry.stat().st_size for entry in os.scandir(self._half))
        return found

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
    tokenizer = storage.get_tokenizer(wanted.place)  # first: what lies here is taken for all there is
    try:
        storage.get(wanted.place, wanted.sha256, checkpoints)
    except NotWhole:
        if wanted.set_aside:
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
        print("this host's disk is full" if full else f"this host's disk does not take it: {told(error)}")
        return DISK_FULL if full else AWAY
    return THERE


if __name__ == "__main__":
    sys.exit(main())
