"""Runs of the tiny model inside this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.moe.train.tiny import Run, tiny


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """Starts runs of `tiny`: run(attempt=1, out=…, training={…})."""

    def start(attempt: int = 0, out: Path | None = None, **changes: dict[str, Any]) -> Run:
        return Run(tiny(**changes), out or tmp_path / "run", attempt)

    return start
