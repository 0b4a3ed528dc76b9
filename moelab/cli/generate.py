"""`moelab generate`: text from a run's checkpoint, and which experts wrote it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moelab.cli import exit_code
from moelab.cli.options import add_connection, add_json, add_run, connect, print_json
from moelab.cli.table import table

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
examples:
  moelab generate 12 "def main(" --tokens 80 --temperature 0.5
  moelab generate 12 "import" --greedy --experts
  moelab generate 12 "import" --step 300 --json > written.json
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="write text with a run's checkpoint",
        description="Goes on from a prompt with a checkpoint of a run, and tells which experts took each token.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("prompt", nargs="?", default="", help="the text to go on from; none begins a document")
    parser.add_argument("--tokens", type=int, help="tokens to write at most, up to 512 (default 64)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default 0.8)")
    parser.add_argument("--greedy", action="store_true", help="always take the most probable token: temperature 0")
    parser.add_argument("--top-p", type=float, help="draw from the most probable tokens of this mass (default 1)")
    parser.add_argument("--top-k", type=int, help="draw from so many of the most probable tokens (default: all)")
    parser.add_argument("--seed", type=int, help="the same seed draws the same text (default 0)")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="give up after so long (default 120)")
    parser.add_argument("--experts", action="store_true", help="also print each token's experts")
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.greedy and args.temperature:
        raise exit_code.UsageError("--greedy is temperature 0: leave out --temperature")
    wanted = {name: getattr(args, name) for name in ("tokens", "top_p", "top_k", "seed", "step")}
    with connect(args) as client:
        try:
            made = client.generate(args.run_id, args.prompt, **wanted, temperature=0.0 if args.greedy else args.temperature, wait_s=args.timeout)
        except TimeoutError as error:
            print(f"moelab generate: {error}", file=sys.stderr)
            return exit_code.FAILED
    if args.json:
        print_json(made)
    elif made["state"] == "succeeded":
        _show(made["result"], experts=args.experts)
    if made["state"] != "succeeded":
        print(f"moelab generate: {made['reason']}: {made['detail']}", file=sys.stderr)
        return exit_code.FAILED
    return exit_code.OK


def _show(result: dict[str, Any], *, experts: bool) -> None:
    print("".join(result["texts"]))
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if experts:
        titles = ["token", "text", "log-prob", *(f"layer {layer}" for layer in result["moe_layers"])]
        print(table(titles, _rows(result), right=["token", "log-prob"]))


def _rows(result: dict[str, Any]) -> Iterator[list[object]]:
    for place, (text, log_prob, layers) in enumerate(zip(result["texts"], result["log_probs"], result["experts"], strict=True)):
        yield [place, repr(text)[1:-1], log_prob, *(" ".join(map(str, chosen)) for chosen in layers)]
