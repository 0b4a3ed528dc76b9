"""`moelab worker` and `moelab beat`: the processes of a GPU host and of its bell."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from moelab.cli import exit_code

if TYPE_CHECKING:
    from moelab.cli import Subparsers

WORKER = """\
Takes runs from the server and starts a supervisor for each; a supervisor outlives this process.
  MOELAB_SERVER, MOELAB_TOKEN   the server, and a token with the scope `worker`
  REDIS_URL                     the bell; without it the worker hears of work late
  MOELAB_HOME                   where runs, checkpoints and spools are kept; each worker has one of its own
  MOELAB_CHECKPOINTS            a storage that hosts share, for copies of the checkpoints: file:///shared/…, s3://bucket/…
  MOELAB_SLOTS                  runs at once (one for each CUDA device, else one)
  MOELAB_ADDRESS                where other hosts of a run reach it (the address towards the server)
  MOELAB_WORKER_NAME            its name on the workers page (the host's name)

example:
  MOELAB_SERVER=https://lab.example.org MOELAB_TOKEN=mlk_... REDIS_URL=rediss://... moelab worker
"""


def add_parser(subparsers: Subparsers) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    worker = subparsers.add_parser("worker", help="take runs on this host", description=WORKER, formatter_class=raw)
    worker.set_defaults(run=_worker)
    beat = subparsers.add_parser("beat", help="ring the workers' bell every 10 s", description="Rings the workers' bell every 10 seconds.")
    beat.set_defaults(run=_beat)


def _worker(args: argparse.Namespace) -> int:
    from workers.app import start_worker
    from workers.tenant import HomeInUseError

    try:
        start_worker()
    except HomeInUseError as error:
        print(f"moelab worker: {error}", file=sys.stderr)
        return exit_code.FAILED
    except ValueError as error:
        print(f"moelab worker: {error}", file=sys.stderr)
        return exit_code.USAGE
    return exit_code.OK


def _beat(args: argparse.Namespace) -> int:
    from workers.app import start_beat

    start_beat()
    return 0
