"""Starts the supervisor of a claimed run, so that it outlives whoever starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 20.0


class LaunchError(RuntimeError):
    """The supervisor did not start; the message says why."""


def launch(claim: dict[str, Any], runs: Path) -> None:
    """Returns once the supervisor has the attempt's lock and is on its own. The claim, which holds a token, goes through a pipe only.

    Raises LaunchError.
    """
    run_dir = runs / str(int(claim["run"]))
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "workers.supervisor", str(run_dir)],
            input=json.dumps(claim).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"run {claim['run']}: {error}") from error
    if done.returncode:
        raise LaunchError(f"run {claim['run']}: {done.stderr.decode(errors='replace').strip()[-1000:]}")
