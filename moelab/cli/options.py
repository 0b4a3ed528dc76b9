"""Options that most commands share: which server, with which token, and JSON instead of tables."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.client import Client


def add_connection(parser: argparse.ArgumentParser) -> None:
    """`--server` and `--token`."""
    group = parser.add_argument_group("server")
    group.add_argument("--server", metavar="URL", help="address of the server (default: MOELAB_SERVER, else the local one)")
    group.add_argument("--token", metavar="TOKEN", help="API token (default: MOELAB_TOKEN, else the local server's)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The number of a run."""
    parser.add_argument("run_id", type=int, metavar="RUN", help="number of the run")


def connect(args: argparse.Namespace) -> Client:
    """The client that the options ask for."""
    from moelab.client import Client

    return Client(args.server, args.token)


def print_json(data: Any) -> None:
    """`data` as indented JSON."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
