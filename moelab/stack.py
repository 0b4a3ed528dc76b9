"""Everything on one machine: embedded servers, web, beat and a worker, kept running by one process.

Whatever dies is started again. Whatever we started dies with us, except the supervisors of runs: those go on training,
spool what they have to say, and find the server again when it is back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from moelab import environment
from moelab.embedded import Postgres, Valkey, child
from moelab.embedded.postgres import PostgresError
from moelab.embedded.valkey import ValkeyError

RETRY_S = 5.0
_SCOPES = ("read", "write", "ingest", "admin")


class StackError(RuntimeError):
    """The stack cannot start; the message says why and what to do."""


@dataclass
class Service:
    """One process of ours and how to start it again."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    backoff_s: float = 0.25
    retry_at: float = 0.0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.poll() is None else None

    def start(self) -> None:
        self.process = child.start(self.argv, log=self.log, env={**os.environ, **self.env})
        self.started = time.monotonic()

    def revive(self) -> bool:
        """Starts it again if it has died; waits longer after each early death, up to 10 s. True if it was started."""
        if self.pid is not None:
            return False
        now = time.monotonic()
        if self.retry_at == 0.0:
            self.backoff_s = 0.25 if now - self.started > 30 else min(self.backoff_s * 2, 10.0)
            self.retry_at = now + self.backoff_s
        if now < self.retry_at:
            return False
        self.retry_at = 0.0
        self.start()
        return True

    def stop(self, grace_s: float = 10.0) -> None:
        if self.process is not None:
            child.stop(self.process, grace_s=grace_s)


@dataclass
class Stack:
    """The whole product. Use it as a context manager; `watch()` keeps it alive."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 8000
    worker: bool = True
    worker_env: dict[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = print
    ticket: str = ""
    token: str = ""

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        os.environ["MOELAB_HOME"] = str(self.home)
        self.postgres = None if os.environ.get("DATABASE_URL") else Postgres(self.home / "postgres", log=self.home / "log" / "postgres.log")
        self.valkey = None if os.environ.get("REDIS_URL") else Valkey(self.home / "valkey", log=self.home / "log" / "valkey.log")
        self.services: list[Service] = []
        self._lock_fd = -1
        self._retry_at = 0.0

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def service(self, name: str) -> Service:
        return next(service for service in self.services if service.name == name)

    def __enter__(self) -> Stack:
        self._lock()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self.port = _free_port(self.host, self.port)
        try:
            for server in (self.postgres, self.valkey):
                if server is not None:
                    server.start()
        except (PostgresError, ValkeyError, PermissionError) as error:
            raise StackError(str(error)) from error
        os.environ.update(self._environment())
        environment.write_private(environment.environment_file(), json.dumps(self._environment(), indent=1))
        worker_token = self._prepare_database()
        python = sys.executable
        web = [python, "-m", "uvicorn", "moelab.asgi:application", "--host", self.host, "--port", str(self.port), "--log-level", "warning"]
        web += ["--no-access-log", "--ws-max-size", str(5_000_000), "--ws-per-message-deflate", "false", "--timeout-graceful-shutdown", "3"]
        self._add("web", web, {})
        if self.worker:
            self._add("worker", [python, "-m", "moelab.cli", "worker"], {"MOELAB_SERVER": self.url, "MOELAB_TOKEN": worker_token, **self.worker_env})
            self._add("beat", [python, "-m", "moelab.cli", "beat"], {})
        self._await_web()

    def _environment(self) -> dict[str, str]:
        found = {"MOELAB_PUBLIC_URL": os.environ.get("MOELAB_PUBLIC_URL", self.url)}
        if self.postgres is not None:
            found["DATABASE_URL"] = self.postgres.url
        if self.valkey is not None:
            found["REDIS_URL"] = self.valkey.url
        if self.host not in ("127.0.0.1", "localhost", "::1") and not os.environ.get("MOELAB_ALLOWED_HOSTS"):
            found["MOELAB_ALLOWED_HOSTS"] = f"127.0.0.1,localhost,[::1],{self.host}"
        return found

    def _add(self, name: str, argv: list[str], env: dict[str, str]) -> None:
        service = Service(name, argv, env, self.home / "log" / f"{name}.log")
        service.start()
        self.services.append(service)

    def _prepare_database(self) -> str:
        """Migrates, makes the first account, and returns a fresh token for the worker."""
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "moelab.settings")
        import django

        django.setup()
        from django.contrib.auth import get_user_model
        from django.core.management import call_command
        from django.db import connections

        from experiments.actions import ticket, token

        call_command("migrate", verbosity=0, interactive=False)
        users = get_user_model()
        admin = users.objects.filter(is_superuser=True, is_active=True).order_by("id").first()
        if admin is None:
            password = secrets.token_urlsafe(12)
            admin = users.objects.create_superuser("admin", password=password)
            environment.write_private(self.home / "admin_password", password + "\n")
        client_file = self.home / "client.json"
        self.token = _kept_token(client_file) or token.issue(user=admin, name="this machine's command line", scopes=_SCOPES).secret
        environment.write_private(client_file, json.dumps({"server": self.url, "token": self.token}))
        token.revoke_named(user=admin, name="this machine's worker")
        worker_token: str = token.issue(user=admin, name="this machine's worker", scopes=["worker"]).secret
        self.ticket = f"{self.url}{ticket.make(admin)}"
        connections.close_all()
        return worker_token

    def _await_web(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/healthz", timeout=2).status_code == 200:
                    return
            if self.service("web").pid is None:
                break
            time.sleep(0.05)
        raise StackError(f"the web process did not start; its log ends:\n{child.tail(self.service('web').log)}")

    def revive(self) -> None:
        """Starts again whatever has died. Call it from the main thread, often."""
        for name, server in (("postgres", self.postgres), ("valkey", self.valkey)):
            if server is not None and server.pid is None and time.monotonic() >= self._retry_at:
                self.say(f"{name} died; starting it again")
                try:
                    server.start()
                except (PostgresError, ValkeyError, OSError) as error:
                    self.say(f"{error}\ntrying again in {RETRY_S:.0f} s")
                    self._retry_at = time.monotonic() + RETRY_S
        for service in self.services:
            if service.revive():
                self.say(f"{service.name} died; started again (log: {service.log})")

    def watch(self, until: Callable[[], bool] = lambda: False, every_s: float = 0.5) -> None:
        """Keeps everything running until `until()` is true or a signal interrupts."""
        while not until():
            self.revive()
            time.sleep(every_s)

    def close(self) -> None:
        """Ends everything in order: the worker first, so that the runs' last words still reach the store."""
        names = {service.name: service for service in self.services}
        for name in ("beat", "worker"):
            if name in names:
                names[name].stop()
        self._stop_runs()
        if "web" in names:
            names["web"].stop()
        self.services.clear()
        for server in (self.valkey, self.postgres):
            if server is not None:
                server.stop()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _stop_runs(self, grace_s: float = 15.0) -> None:
        """Asks the supervisors on this machine to checkpoint and end; their runs are queued again and go on at the next start."""
        from workers.generation import answering
        from workers.host import running_supervisors

        if (writer := answering()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(writer, signal.SIGTERM)
        supervisors = running_supervisors(self.home)
        if not supervisors:
            return
        self.say(f"{len(supervisors)} run(s) in training: saving checkpoints; they go on at the next start")
        for pid in supervisors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while running_supervisors(self.home) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _lock(self) -> None:
        self._lock_fd = os.open(self.home / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise StackError(f"moelab is already up on {self.home}; stop it first, or set MOELAB_HOME to another directory") from None


def _kept_token(client_file: Path) -> str:
    """The command line's token of an earlier start, if this database knows it and it still does all that it must; else empty."""
    from experiments.access import authenticate_token

    try:
        found = str(json.loads(client_file.read_text())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    principal = authenticate_token(found)
    return found if principal is not None and principal.scopes.issuperset(_SCOPES) else ""


def _free_port(host: str, wanted: int) -> int:
    """`wanted`, or the next port of 20 that nobody listens on. Raises StackError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(wanted, wanted + 20):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise StackError(f"no free port from {wanted} to {wanted + 19} on {host}; choose another with --port")
