"""`moelab submit`: queue a run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.describe import add_description, described
from moelab.cli.follow import follow
from moelab.cli.options import add_connection, add_json, connect, print_json

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
examples:
  moelab submit nano-mixtral --follow
  moelab submit spec.yaml --set optimizer.lr=1e-3 --name "lower rate" --tag sweep
  moelab presets nano-mixtral > mine.yaml && $EDITOR mine.yaml && moelab submit mine.yaml
  moelab submit spec.yaml --dry-run            check and price it, without running it

With --follow the exit code tells the final state: 0 succeeded, 1 failed, 130 cancelled.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "submit",
        help="queue a run",
        description="Queues a run of a spec or a preset.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_description(parser)
    parser.add_argument("--name", help="what to call the run (default: the spec's name)")
    parser.add_argument("--project", help="project to put it in (default: default)")
    parser.add_argument("--tag", action="append", default=[], metavar="TAG", help="label it (repeatable)")
    parser.add_argument("--notes", help="a text to keep with it")
    parser.add_argument("--priority", type=int, help="higher goes first; from -1000 to 1000 (default 0)")
    parser.add_argument("--resume-from", metavar="RUN[:STEP]", help="start from a checkpoint of another run")
    parser.add_argument("--follow", "-f", action="store_true", help="print its log until it has ended")
    parser.add_argument("--dry-run", action="store_true", help="check the spec and print its price as JSON; nothing is queued")
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    wanted = described(args)
    with connect(args) as client:
        if args.dry_run:
            print_json(client.validate(**wanted))
            return exit_code.OK
        made = client.submit(
            **wanted, name=args.name, project=args.project, tags=args.tag, notes=args.notes, priority=args.priority,
            resume_from=_checkpoint(args.resume_from),
        )  # fmt: skip
        if args.json:
            print_json(made)
        else:
            print(f"run {made['id']} {made['state']}  {client.server}/runs/{made['id']}/", flush=True)
        return follow(client, made["id"]) if args.follow else exit_code.OK


def _checkpoint(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    run, colon, step = text.partition(":")
    if not run.isdigit() or (colon and not step.isdigit()):
        raise exit_code.UsageError(f"--resume-from {text}: write RUN or RUN:STEP, as in 12:300")
    return {"run": int(run)} | ({"step": int(step)} if colon else {})
