"""The product as a user starts it, a made-up host beside it, and Chromium. A page that logs an error or breaks the policy fails its test."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, sync_playwright

from moelab.client import Client
from tests.end_to_end import chromium
from tests.end_to_end.browser.made_up import MadeUpHost, MadeUpRun

PROJECT = Path(__file__).resolve().parents[3]
NOT_OURS = ("DATABASE_URL", "REDIS_URL", "DJANGO_SETTINGS_MODULE", "MOELAB_SECRET_KEY", "MOELAB_SERVER", "MOELAB_TOKEN")
GPU = {"parallel.device": "cuda"}


class Live:
    """A running stack with a client, and a made-up host that takes what asks for a GPU."""

    def __init__(self, home: Path, up: subprocess.Popen[bytes]) -> None:
        found = json.loads((home / "client.json").read_text())
        self.up, self.home, self.server = up, home, str(found["server"])
        self.client = Client(found["server"], found["token"])
        self.password = (home / "admin_password").read_text().strip()
        self.host = MadeUpHost(self.server, self.client.create_token("made-up host", ["worker"])["secret"])
        self.host.hello()
        self.claimed = 0

    def made_up(self, name: str, steps: int, seed: int = 1, **overrides: Any) -> MadeUpRun:
        """A claimed run that has said its opening."""
        self.client.submit(preset="nano-mixtral", name=name, overrides={"training.steps": steps, **GPU, **overrides})
        self.host.hello()
        self.claimed += 1
        run = self.host.claim([f"cuda:{self.claimed % 4}"], seed)
        run.send(run.opening())
        return run

    def kill_web(self) -> None:
        """Ends the web process; `moelab up` starts another."""
        for process in psutil.Process(self.up.pid).children():
            with contextlib.suppress(psutil.Error):
                if "uvicorn" in " ".join(process.cmdline()):
                    process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="package")
def live() -> Iterator[Live]:
    home = Path(tempfile.mkdtemp(prefix="moelab-browser-"))
    home.chmod(0o755)  # PostgreSQL, started by root, runs as another account and must reach its data below
    env = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    env |= {"MOELAB_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    log = (home / "up.log").open("wb")
    up = subprocess.Popen([sys.executable, "-m", "moelab.cli", "up", "--port", str(_free_port())], env=env, stdout=log, stderr=log, cwd=PROJECT)
    try:
        deadline = time.monotonic() + 90
        while b"moelab is up" not in (home / "up.log").read_bytes():
            assert up.poll() is None and time.monotonic() < deadline, (home / "up.log").read_text()
            time.sleep(0.1)
        yield Live(home, up)
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait(40)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    path = chromium.find()
    if path is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no Chromium: python -m tests.end_to_end.chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=chromium.ARGS)
        yield found
        found.close()


@pytest.fixture(scope="package")
def signed_in(live: Live, browser: Browser) -> Any:
    """The cookies of somebody who has signed in with the form."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{live.server}/login")
    page.get_by_label("Account").fill("admin")
    page.get_by_label("Password").fill(live.password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/runs")
    state = context.storage_state()
    context.close()
    return state


Opened = Callable[..., Page]
# What a test does on purpose: cut the line, ask for what is not there, send what is refused.
EXPECTED = (
    "WebSocket connection",
    "ERR_CONNECTION_REFUSED",
    "status of 400",
    "status of 404",
    "status of 422",
    "ERR_EMPTY_RESPONSE",
    "ERR_CONNECTION_RESET",
    "getImageData",
)


@pytest.fixture
def open_page(live: Live, browser: Browser, signed_in: Any) -> Iterator[Opened]:
    """Opens a path in a window of its own. Whatever a page complains of fails the test at its end."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def refuse(path: str, dialog: Dialog) -> None:
        complaints.append(f"{path}: a script ran: {dialog.message}")
        dialog.dismiss()

    def open_(path: str, *, width: int = 1280, height: int = 900, theme: Any = "dark") -> Page:
        context = browser.new_context(storage_state=signed_in, viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(f"{path}: {message.text}") if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(f"{path}: {error}"))
        page.on("dialog", lambda dialog: refuse(path, dialog))
        page.on("response", lambda r: print(r.status, r.request.method, r.url) if "/api/" in r.url else None)
        page.goto(live.server + path)
        return page

    yield open_
    for context in contexts:
        context.close()
    if complaints:
        print((live.home / "log" / "web.log").read_text()[-3000:])
    assert [text for text in complaints if not any(word in text for word in EXPECTED)] == []
