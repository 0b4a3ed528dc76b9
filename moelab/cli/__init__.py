"""The command line: `moelab COMMAND`.

Each module named in MODULES brings one command or a few: `add_parser(subparsers)` declares them and sets
`run`, a function of the parsed arguments that returns the exit code. Modules import what is heavy inside `run`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from moelab.cli import exit_code

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

MODULES = (
    "up",
    "demo",
    "submit",
    "ps",
    "logs",
    "wait",
    "control",
    "clone",
    "generate",
    "export",
    "placement",
    "presets",
    "price",
    "baseline",
    "huggingface",
    "spool",
    "worker",
)

EPILOG = """\
examples:
  moelab up                                  start everything on this machine
  moelab submit nano-mixtral --follow        train a small MoE and watch its log
  moelab submit spec.yaml --set model.moe.top_k=4 --name four
  moelab ps --state running                  what is running
  moelab wait 12 && moelab export 12 metrics.parquet

exit codes: 0 done or succeeded, 1 failed, 2 wrong use, 3 server out of reach, 4 refused by the server, 130 cancelled
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="moelab",
        description="Launch, watch and inspect Mixture-of-Experts training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in MODULES:
        import_module(f"moelab.cli.{name}").add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors of use and of the server are told in a line, without a traceback."""
    args = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    from moelab.client import ApiError, ServerUnreachable

    try:
        return run(args)
    except ApiError as error:
        print(f"moelab: {error}", file=sys.stderr)
        return exit_code.REFUSED
    except ServerUnreachable as error:
        print(f"moelab: {error}", file=sys.stderr)
        return exit_code.UNREACHABLE
    except exit_code.UsageError as error:
        print(f"moelab {args.command}: {error}", file=sys.stderr)
        return exit_code.USAGE
    except KeyboardInterrupt:
        return exit_code.CANCELLED
    except BrokenPipeError:
        sys.stderr.close()
        return exit_code.OK
