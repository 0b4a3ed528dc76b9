"""`moelab price`: parameters, FLOPs and bytes of a spec, before anything is allocated. Needs no server."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.describe import add_description, read_spec, tell
from moelab.cli.options import add_json, print_json

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
Active parameters come in the three conventions that publications use: with embeddings, without the input embedding,
and without input and output embedding.

examples:
  moelab price mixtral-8x7b
  moelab price mixtral-8x7b --json | jq .active_params
  moelab price spec.yaml --set model.moe.n_experts=64
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "price",
        help="count parameters, FLOPs and bytes of a spec",
        description="Counts parameters, FLOPs and bytes of a spec or preset, exactly.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_description(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from spec.accounting import price, table
    from spec.problems import from_validation_error

    try:
        spec = read_spec(args)
    except ValidationError as error:
        return tell(from_validation_error(error))
    cost = price(spec)
    print_json(cost.model_dump()) if args.json else print(table(cost))
    return exit_code.OK
