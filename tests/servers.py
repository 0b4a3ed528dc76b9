"""The addresses of this test run's servers and what else must be in the environment before anything reads it.

A pytest plugin (`-p tests.servers` in pyproject.toml), because pytest-django reads the settings before any conftest.py.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moelab.embedded import Postgres, Valkey

SCRATCH = Path(tempfile.mkdtemp(prefix="moelab-test-"))
SCRATCH.chmod(0o755)  # PostgreSQL, started by root, runs as another account and must reach its data below.
POSTGRES = Postgres(SCRATCH / "postgres", durable=False)
VALKEY = Valkey(SCRATCH / "valkey")

os.environ["MOELAB_HOME"] = str(SCRATCH / "home")
os.environ["DATABASE_URL"] = POSTGRES.url
os.environ["REDIS_URL"] = VALKEY.url
os.environ["MOELAB_SECRET_KEY"] = "only-for-tests-" + "x" * 32
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which any test may be the first to do
