"""Finds Chromium for the browser tests, or installs it where that needs no question: `python -m tests.end_to_end.chromium`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The path of a Chromium: MOELAB_CHROMIUM, one on the PATH, or Playwright's own."""
    if given := os.environ.get("MOELAB_CHROMIUM"):
        return given
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    own = sorted((Path.home() / ".cache" / "ms-playwright").glob("chromium-*/chrome-linux*/chrome"))
    return str(own[-1]) if own else None


def _install() -> None:
    attempts = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        attempts = [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], *attempts]
    for command in attempts:
        if find():
            return
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600, check=False)


if __name__ == "__main__":
    if not find():
        _install()
    print(find() or "no Chromium found: the browser tests will be skipped (set MOELAB_CHROMIUM, or install chromium)")
