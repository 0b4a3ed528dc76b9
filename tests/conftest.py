"""Real servers for the tests: an embedded PostgreSQL and Valkey, started when the first test that needs one asks.

Settings are read before any fixture runs, so the servers' addresses are fixed in tests/servers.py and the servers come later.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from moelab.embedded import Postgres, Valkey
from tests.servers import POSTGRES, SCRATCH, VALKEY


def pytest_sessionfinish() -> None:
    POSTGRES.stop()
    VALKEY.stop()
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The running database server of this test run."""
    if POSTGRES.pid is None:
        POSTGRES.start()
    yield POSTGRES


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """The running Valkey of this test run. A test that kills it starts it again."""
    if VALKEY.pid is None:
        VALKEY.start()
    yield VALKEY


@pytest.fixture(scope="session")
def valkey_url(valkey: Valkey) -> str:
    """Its address, in redis-py's form."""
    return valkey.url


@pytest.fixture(scope="session")
def django_db_modify_db_settings(postgres: Postgres, django_db_modify_db_settings_parallel_suffix: None) -> None:
    """Starts the database server before pytest-django makes its test database."""
