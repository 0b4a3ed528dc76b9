"""Real PostgreSQL and Valkey servers out of wheels: private unix sockets, no TCP port, gone with the process that started them."""

from moelab.embedded.postgres import Postgres
from moelab.embedded.valkey import Valkey

__all__ = ["Postgres", "Valkey"]
