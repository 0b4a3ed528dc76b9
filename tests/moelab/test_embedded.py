"""The embedded servers: real, private, gone with their parent, and back after anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from moelab.embedded import Postgres, Valkey, place
from moelab.embedded.postgres import PostgresError


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="moelab-embedded-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def postgres_server(scratch: Path) -> Iterator[Postgres]:
    server = Postgres(scratch / "postgres").start()
    yield server
    server.stop()


def tcp_listeners(pid: int) -> list[object]:
    return [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_postgres_keeps_its_data_through_a_kill_and_a_restart(postgres_server: Postgres) -> None:
    with psycopg.connect(postgres_server.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    os.kill(postgres_server.pid, signal.SIGKILL)
    while postgres_server.pid is not None:
        time.sleep(0.01)
    postgres_server.start()
    with psycopg.connect(postgres_server.url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (7,)


def test_postgres_listens_on_its_private_socket_alone(postgres_server: Postgres) -> None:
    assert tcp_listeners(postgres_server.pid) == []
    assert postgres_server.sockets.stat().st_mode & 0o077 == 0


def test_postgres_starts_over_a_pid_file_that_names_somebody_else(postgres_server: Postgres) -> None:
    postgres_server.stop()
    (postgres_server.data / "postmaster.pid").write_text(f"{os.getpid()}\n{postgres_server.data}\n")
    assert postgres_server.start().pid is not None


def test_a_second_server_on_the_same_data_is_refused(postgres_server: Postgres, scratch: Path) -> None:
    with pytest.raises(PostgresError, match=rf"already runs on .*process {postgres_server.pid}"):
        Postgres(scratch / "postgres").start()


def test_roots_hidden_directories_are_left_closed(scratch: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's servers run as another account")
    hidden = scratch / "hidden"
    hidden.mkdir(mode=0o700)
    server = Postgres(hidden / "postgres", durable=False).start()
    try:
        assert not server.data.is_relative_to(hidden)
        assert hidden.stat().st_mode & 0o777 == 0o700
    finally:
        server.stop()
        subprocess.run(["rm", "-rf", str(server.data)], check=True)


def test_servers_end_when_their_parent_is_killed(scratch: Path) -> None:
    program = """
        import sys, time
        from pathlib import Path
        from moelab.embedded import Postgres, Valkey
        home = Path(sys.argv[1])
        print(Postgres(home / "postgres", durable=False).start().pid, Valkey(home / "valkey").start().pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(scratch)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_valkey_comes_back_on_the_same_socket(scratch: Path) -> None:
    server = Valkey(scratch / "valkey").start()
    try:
        assert redis.Redis.from_url(server.url).ping()
        assert tcp_listeners(server.pid) == []
        os.kill(server.pid, signal.SIGKILL)
        while server.pid is not None:
            time.sleep(0.01)
        server.start()
        assert redis.Redis.from_url(server.url).ping()
    finally:
        server.stop()


def test_sockets_fit_the_kernels_limit_however_long_the_path() -> None:
    deep = Path("/tmp") / ("x" * 150) / "postgres"
    assert len(str(place.socket_directory(deep) / ".s.PGSQL.5432")) < 107


def test_sockets_do_not_lie_where_somebody_else_has_laid_a_trap(scratch: Path) -> None:
    server = Valkey(scratch / "valkey")
    (scratch / "precious").mkdir(mode=0o755)
    server.sockets.symlink_to(scratch / "precious")
    try:
        with pytest.raises(PermissionError, match="somebody else"):
            server.start()
        assert (scratch / "precious").stat().st_mode & 0o777 == 0o755
    finally:
        server.sockets.unlink()
