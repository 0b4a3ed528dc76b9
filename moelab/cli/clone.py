"""`moelab clone`: a run like another, with some fields changed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.describe import add_set, overrides
from moelab.cli.follow import follow
from moelab.cli.options import add_connection, add_json, add_run, connect, print_json

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
examples:
  moelab clone 12 --set model.moe.top_k=4 --name "top four" --follow
  for lr in 1e-3 3e-3; do moelab clone 12 --set optimizer.lr=$lr; done
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "clone",
        help="run a run's spec again with changes",
        description="Queues a run of another run's spec with some fields changed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    add_set(parser)
    parser.add_argument("--name", help="what to call the new run")
    parser.add_argument("--follow", "-f", action="store_true", help="print its log until it has ended")
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        made = client.clone(args.run_id, set=overrides(args.set), name=args.name)
        if args.json:
            print_json(made)
        else:
            print(f"run {made['id']} {made['state']}  {client.server}/runs/{made['id']}/", flush=True)
        return follow(client, made["id"]) if args.follow else exit_code.OK
