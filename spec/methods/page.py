"""The registry as a page of Markdown."""

from __future__ import annotations

import json

from spec.methods import GROUPS, Method, methods

TITLES = {
    "routers": "Routers",
    "balancing": "Balancing",
    "capacity": "Capacity",
    "architecture": "Architecture",
    "training": "Training",
}
HEAD = """\
# The methods

Written by `python -m spec.methods` from `spec/methods/`; a test compares the two. `Spec` is what differs from the default spec, and can be
given as it stands (`moelab submit`, the form's YAML, REST). `Proof` names what the method is compared with, and the test.
"""


def markdown() -> str:
    """A table for each group."""
    return "\n".join([HEAD, *(_table(group) for group in GROUPS)])


def _table(group: str) -> str:
    rows = [_row(method) for method in methods() if method.group == group]
    return "\n".join([f"## {TITLES[group]}", "", "| Method | Rule | Source | Spec | Shows | Proof |", "|---|---|---|---|---|---|", *rows, ""])


def _row(method: Method) -> str:
    cells = (
        f"**{method.name}**",
        method.rule,
        method.source,
        f"`{json.dumps(method.spec)}`",
        method.reports,
        f"{method.oracle} (`{method.test}`)",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
