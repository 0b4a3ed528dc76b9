"""`moelab spool`: recordings that have not reached the server yet."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.options import add_connection

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
moelab.Recorder writes to a file before anything is sent; what the server did not get stays there. Runs that moelab itself trains
need none of this: their supervisor ships until everything has arrived.

example:
  moelab spool sync
"""


def add_parser(subparsers: Subparsers) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    spool = subparsers.add_parser("spool", help="ship what moelab.Recorder left behind", epilog=EPILOG, formatter_class=raw)
    verbs = spool.add_subparsers(dest="verb", metavar="VERB", required=True)
    sync = verbs.add_parser("sync", help="ship recordings of processes that have ended", epilog=EPILOG, formatter_class=raw)
    sync.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="give up on one after so long (default %(default)s)")
    add_connection(sync)
    sync.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from moelab.client import Client
    from moelab.recording import leftovers, sync

    waiting = leftovers()
    if not waiting:
        print("nothing to ship")
        return exit_code.OK
    with Client(args.server, args.token) as client:
        client.me()  # says at once whether the server is there and knows us
        shipped = 0
        for recording in waiting:
            whole = sync(recording, args.server, args.token, args.timeout)
            shipped += whole
            print(f"run {recording.facts.run or '?'}  {recording.facts.name}: {'shipped' if whole else 'not shipped; try again later'}", flush=True)
    return exit_code.OK if shipped == len(waiting) else exit_code.FAILED
