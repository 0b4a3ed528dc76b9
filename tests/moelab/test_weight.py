"""What each process may load: the web process never torch, the client never Django."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    program = f"{statement}\nimport sys; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import moelab.asgi", "import moelab.cli; moelab.cli.build_parser()", "import workers.app, workers.supervisor"]
)
def test_torch_stays_with_the_trainer(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "triton"}


@pytest.mark.parametrize("statement", ["from moelab import Client", "import moelab.cli; moelab.cli.build_parser()"])
def test_django_stays_with_the_server(statement: str) -> None:
    assert not loaded_by(statement) & {"django", "rest_framework", "channels", "experiments"}
