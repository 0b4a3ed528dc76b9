"""What the exit codes of `moelab` mean."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
REFUSED = 4
CANCELLED = 130

_BY_STATE = {"succeeded": OK, "failed": FAILED, "cancelled": CANCELLED}


class UsageError(Exception):
    """The command was used wrongly; the message says how to use it."""


def for_state(state: str) -> int:
    """The exit code of a run that ended in `state`; a state that is not final counts as fine."""
    return _BY_STATE.get(state, OK)
