"""`moelab placement`: which device would hold which experts, if they were placed by the load that a run measured."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from moelab.cli import exit_code
from moelab.cli.options import add_connection, add_json, add_run, connect, print_json
from moelab.cli.table import table

if TYPE_CHECKING:
    from moelab.cli import Subparsers

EPILOG = """\
Balance is mean / largest load of a device: 1 is even. Before is equal, consecutive parts of the experts, as in training.

examples:
  moelab placement 12 --devices 8                          each expert once
  moelab placement 12 --devices 8 --replicas 16 --nodes 2  hot experts several times, whole groups on a node
  moelab placement 12 --devices 8 --layer 3                who holds what in layer 3
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "placement",
        help="show where experts would lie if placed by their load",
        description="Places a run's experts on devices by their measured load, hot ones several times (EPLB).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run(parser)
    parser.add_argument("--devices", type=int, metavar="N", help="devices that share the experts (default: the run's own ranks)")
    parser.add_argument("--replicas", type=int, metavar="N", help="places for experts over all devices (default: one for each expert)")
    parser.add_argument("--nodes", type=int, metavar="N", help="hosts of the devices (default 1)")
    parser.add_argument("--groups", type=int, metavar="N", help="groups of experts that routing is limited to (default: the router's)")
    parser.add_argument("--from", type=int, metavar="STEP", dest="from_step", help="first step of the load (default: the last 100 steps)")
    parser.add_argument("--to", type=int, metavar="STEP", dest="to_step", help="last step of the load (default: the newest)")
    parser.add_argument("--layer", type=int, metavar="LAYER", help="show the devices of this layer of the model")
    add_json(parser)
    add_connection(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    names = ("devices", "replicas", "nodes", "groups", "from_step", "to_step")
    with connect(args) as client:
        found = client.placement(args.run_id, **{name: getattr(args, name) for name in names})
    if args.json:
        print_json(found)
        return exit_code.OK
    chosen = [layer for layer in found["layers"] if layer["layer"] == args.layer]
    if args.layer is not None and not chosen:
        raise exit_code.UsageError(f"--layer {args.layer} is no MoE layer: {', '.join(str(layer['layer']) for layer in found['layers'])}")
    print(_devices(chosen[0]) if chosen else _layers(found))
    nodes = f" of {found['nodes']} nodes" if found["nodes"] > 1 else ""
    print(
        f"\nsteps {found['from']} to {found['to']}, {found['policy']}: {found['replicas']} places on {found['devices']} devices{nodes}; "
        f"balance {_figure(found['balance_before'])} -> {_figure(found['balance_after'])}"
    )
    return exit_code.OK


def _layers(found: dict[str, Any]) -> str:
    rows = [
        (layer["layer"], _figure(layer["balance_before"]), _figure(layer["balance_after"]), max(layer["copies"]), _hot(layer))
        for layer in found["layers"]
    ]
    return table(("LAYER", "BEFORE", "AFTER", "MOST COPIES", "HELD SEVERAL TIMES"), rows, right=("LAYER", "BEFORE", "AFTER", "MOST COPIES"))


def _hot(layer: dict[str, Any]) -> str:
    return " ".join(f"{expert}x{copies}" for expert, copies in enumerate(layer["copies"]) if copies > 1)


def _devices(layer: dict[str, Any]) -> str:
    before = layer["load_before"] or [None] * len(layer["load_after"])
    rows = [
        (device, "-" if then is None else f"{then:,.0f}", f"{now:,.0f}", " ".join(map(str, experts)))
        for device, (then, now, experts) in enumerate(zip(before, layer["load_after"], layer["device_experts"], strict=True))
    ]
    return table(("DEVICE", "BEFORE", "AFTER", "EXPERTS"), rows, right=("DEVICE", "BEFORE", "AFTER"))


def _figure(balance: float | None) -> str:
    return "-" if balance is None else f"{balance:.3f}"
