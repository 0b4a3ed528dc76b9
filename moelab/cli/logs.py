"""`moelab logs`: what a run printed."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.follow import follow
from moelab.cli.options import add_connection, add_run, connect

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
examples:
  moelab logs 12 --tail 4000        the last 4,000 bytes
  moelab logs -f 12                 all of it, then what comes, until the run has ended
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "logs",
        help="print a run's log",
        description="Prints what a run printed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run has ended; exit as `moelab wait` does")
    parser.add_argument("--tail", type=int, metavar="BYTES", help="begin so many bytes before the end")
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    offset = -args.tail if args.tail else 0
    with connect(args) as client:
        if args.follow:
            return follow(client, args.run_id, offset)
        sys.stdout.write(client.logs(args.run_id, offset))
    return exit_code.OK
