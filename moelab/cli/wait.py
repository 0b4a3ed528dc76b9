"""`moelab wait`: until a run has ended."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.follow import ending
from moelab.cli.options import add_connection, add_json, add_run, connect, print_json

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
exit codes: 0 succeeded, 1 failed (or not ended within --timeout), 130 cancelled

example:
  moelab wait 12 && moelab export 12 metrics.parquet
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "wait",
        help="wait until a run has ended",
        description="Waits until a run has ended, through restarts of the server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after so long")
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        try:
            ended = client.wait(args.run_id, timeout_s=args.timeout)
        except TimeoutError as error:
            print(f"moelab wait: {error}", file=sys.stderr)
            return exit_code.FAILED
    if args.json:
        print_json(ended)
    else:
        print(ending(ended))
    return exit_code.for_state(ended["state"])
