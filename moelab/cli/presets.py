"""`moelab presets`: the architectures that come with moelab. Needs no server."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.options import add_json, print_json
from moelab.cli.table import count, table

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
examples:
  moelab presets
  moelab presets nano-mixtral > mine.yaml      a start for a spec of your own
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "presets",
        help="list presets, or print one as YAML",
        description="Lists the presets, or prints the spec of one as YAML.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="print this one")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from spec import presets, yaml_text
    from spec.accounting import price

    if args.name is not None:
        try:
            spec = presets.load(args.name)
        except presets.UnknownPresetError as error:
            raise exit_code.UsageError(str(error)) from error
        print_json(spec.model_dump(mode="json")) if args.json else print(yaml_text.dump(spec), end="")
        return exit_code.OK
    found = [(presets.describe(name), price(presets.load(name))) for name in presets.names()]
    if args.json:
        print_json([about.model_dump() | {"total_params": cost.total_params} for about, cost in found])
        return exit_code.OK
    rows = [(about.name, about.size, count(cost.total_params), count(cost.active_params.with_embeddings), about.title) for about, cost in found]
    print(table(("PRESET", "SIZE", "TOTAL", "ACTIVE", "WHAT"), rows, right=("TOTAL", "ACTIVE")))
    return exit_code.OK
