"""`moelab export`: a run's figures as a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.options import add_connection, add_run, connect

if TYPE_CHECKING:
    from moelab.cli import Subparsers

FILES = ("metrics.parquet", "metrics.csv", "metrics.jsonl", "routing.parquet", "routing.npz", "log.txt")
EPILOG = """\
examples:
  moelab export 12 metrics.csv
  moelab export 12 routing.npz -o routing.npz        tokens of each expert at every step, for numpy
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a run's figures to a file",
        description="Writes every step's scalars (metrics), tokens per expert (routing) or what the run printed (log) to a file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("what", choices=FILES, help="what, and in which format")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="where to (default: run-RUN-WHAT here)")
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with connect(args) as client:
        path = client.export(args.run_id, args.what, args.output)
    print(f"{path}  {path.stat().st_size:,} bytes")
    return exit_code.OK
