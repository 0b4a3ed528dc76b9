"""A server of our own for one measurement: fresh database, Valkey, and (where wanted) the web process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from moelab.embedded import Postgres, Valkey, child
from spec import events

LAYERS, EXPERTS, SCALARS, TOKENS = 16, 64, 20, 8192
RUN_TOKEN = "benchmark-run-token"


@contextlib.contextmanager
def database() -> Iterator[Path]:
    """Django set up on a fresh, durable, migrated database and a Valkey; yields the directory of both, which is removed afterwards."""
    home = Path(tempfile.mkdtemp(prefix="moelab-bench-"))
    home.chmod(0o755)
    postgres, valkey = Postgres(home / "postgres"), Valkey(home / "valkey")
    try:
        postgres.start()
        valkey.start()
        os.environ.update(DATABASE_URL=postgres.url, REDIS_URL=valkey.url, MOELAB_HOME=str(home / "home"), MOELAB_SECRET_KEY="b" * 40)
        os.environ["DJANGO_SETTINGS_MODULE"] = "moelab.settings"
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        yield home
    finally:
        with contextlib.suppress(Exception):
            from django.db import connections

            connections.close_all()
        valkey.stop()
        postgres.stop()
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def web(home: Path) -> Iterator[str]:
    """The real web process on that database; yields host:port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = home / "web.log"
    argv = [sys.executable, "-m", "uvicorn", "moelab.asgi:application", "--port", str(port), "--log-level", "warning"]
    process = child.start(argv, log=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/healthz").status_code < 500:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the web process did not start: {child.tail(log)}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        child.stop(process, first=signal.SIGTERM)


def make_run() -> Any:
    """A running run whose attempt 1 speaks with RUN_TOKEN."""
    from django.contrib.auth.models import User

    from experiments import secret
    from experiments.models import Project, Run

    user = User.objects.get_or_create(username="bench", defaults={"is_superuser": True})[0]
    return Run.objects.create(
        project=Project.default(), owner=user, name="bench", state="running", attempt=1, attempt_token_sha256s=[secret.digest(RUN_TOKEN)]
    )


def counts(n: int, seed: int = 0) -> NDArray[np.uint32]:
    """uint32[n, LAYERS, EXPERTS]: top-2 tokens of a batch over experts of uneven popularity."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(EXPERTS, 5.0), size=LAYERS)
    return np.stack([rng.multinomial(2 * TOKENS, shares) for _ in range(n)]).astype(np.uint32)


def opening() -> list[events.Event]:
    """The first events of an attempt."""
    started = events.RunStarted(attempt=1, at=time.time(), moe_layers=list(range(LAYERS)), n_experts=EXPERTS, top_k=2, tokens_per_step=TOKENS)
    return [started, events.MetricsDeclared(names=["loss", *(f"metric_{i}" for i in range(1, SCALARS))])]
