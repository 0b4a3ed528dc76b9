"""`moelab cancel|pause|resume|restart|checkpoint`: steering runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.options import add_connection, add_json, connect, print_json

if TYPE_CHECKING:
    from moelab.cli import Subparsers

VERBS = {
    "cancel": "end runs, after a checkpoint",
    "pause": "save a checkpoint and stop until `moelab resume`",
    "resume": "go on with paused runs from their newest checkpoint",
    "restart": "run ended runs again, as they were",
    "checkpoint": "save a checkpoint now and go on",
}


def add_parser(subparsers: Subparsers) -> None:
    for verb, what in VERBS.items():
        parser = subparsers.add_parser(verb, help=what, description=f"{what.capitalize()}.", epilog=f"example:\n  moelab {verb} 12 13")
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("runs", type=int, nargs="+", metavar="RUN", help="numbers of the runs")
        add_json(parser)
        add_connection(parser)
        parser.set_defaults(run=run, verb=verb)


def run(args: argparse.Namespace) -> int:
    from moelab.client import ApiError

    answers, refused = [], False
    with connect(args) as client:
        for run_id in args.runs:
            try:
                answers.append(getattr(client, args.verb)(run_id))
            except ApiError as error:
                refused = True
                print(f"moelab {args.verb} {run_id}: {error}", file=sys.stderr)
    if args.json:
        print_json(answers)
    else:
        for answer in answers:
            print(f"run {answer['id']} {answer['state']}")
    return exit_code.REFUSED if refused else exit_code.OK
