"""`moelab baseline`: the dense model to compare a Mixture of Experts with. Needs no server."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from moelab.cli import exit_code
from moelab.cli.describe import add_description, read_spec, tell
from moelab.cli.options import add_json, print_json

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
The spec with every layer dense, as wide as costs the same, from scratch; data, optimiser and training stay. It is printed as YAML,
the figures of both on standard error.

examples:
  moelab baseline nano-mixtral > dense.yaml && moelab submit dense.yaml
  moelab baseline mixtral-8x7b --equal params --json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "baseline",
        help="print the dense baseline of a spec",
        description="Prints the dense spec of equal cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_description(parser)
    parser.add_argument("--equal", choices=("flops", "params"), default="flops", help="forward FLOPs per token (default), or active parameters")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from spec import yaml_text
    from spec.accounting import price
    from spec.baseline import NoBaselineError, dense_baseline
    from spec.problems import from_validation_error

    try:
        spec = read_spec(args)
        dense = dense_baseline(spec, args.equal)
    except NoBaselineError as error:
        return tell(error.problems)
    except ValidationError as error:
        return tell(from_validation_error(error))
    print_json(dense.model_dump(mode="json")) if args.json else print(yaml_text.dump(dense), end="")
    for one in (spec, dense):
        cost = price(one)
        figures = f"{cost.flops_per_token.forward:,} forward FLOPs per token, {cost.active_params.with_embeddings:,} active parameters"
        print(f"{one.name}: {figures}, {cost.total_params:,} in all", file=sys.stderr)
    return exit_code.OK
