"""Following a run to its end in the terminal: its log, and one line about how it ended."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from moelab.cli import exit_code
from moelab.cli.table import show

if TYPE_CHECKING:
    from moelab.client import Client


def follow(client: Client, run_id: int, offset: int = 0) -> int:
    """Prints the log until the run has ended; returns the exit code of its final state."""
    for text in client.follow_logs(run_id, offset):
        sys.stdout.write(text)
        sys.stdout.flush()
    run = client.wait(run_id)
    print(ending(run), file=sys.stderr)
    return exit_code.for_state(run["state"])


def ending(run: dict[str, Any]) -> str:
    """One line about a run and how it stands."""
    why = run["reason"] if run["reason"] not in ("", "finished", run["state"]) else ""
    parts = [f"run {run['id']} {run['state']}" + (f" ({why})" if why else "") + f" at step {run['last_step']} of {run['steps'] or '?'}"]
    if run.get("best_val_loss") is not None:
        parts.append(f"best validation loss {show(run['best_val_loss'])}")
    if run["state"] == "failed" and run.get("detail"):
        parts.append(run["detail"])
    return "; ".join(parts)
