"""`moelab ps` and `moelab show`: what runs there are, and one of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from moelab.cli import exit_code
from moelab.cli.options import add_connection, add_json, add_run, connect, print_json
from moelab.cli.table import age, count, duration, show, table

if TYPE_CHECKING:
    from moelab.cli import Subparsers

PS = """\
examples:
  moelab ps --state running
  moelab ps --tag sweep --metric 'lm_loss<2' --order loss
  moelab ps --json | jq '.[].id'
"""
SHOW = """\
examples:
  moelab show 12
  moelab show 12 --spec > again.yaml         the spec as YAML
  moelab show 12 --json | jq .summary
"""


def add_parser(subparsers: Subparsers) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    ps = subparsers.add_parser("ps", help="list runs", description="Lists runs, newest first.", epilog=PS, formatter_class=raw)
    ps.add_argument("--state", help="queued, starting, running, pausing, paused, stopping, succeeded, failed or cancelled; several with commas")
    ps.add_argument("--tag", help="only runs with this tag")
    ps.add_argument("--q", metavar="TEXT", help="only runs whose name or notes contain this")
    ps.add_argument("--metric", metavar="TERM", help="only runs whose newest value fits, as in 'lm_loss<2'")
    ps.add_argument("--project", help="only this project")
    ps.add_argument("--starred", action="store_true", default=None, help="only starred runs")
    ps.add_argument("--archived", action="store_true", default=None, help="archived runs instead")
    ps.add_argument("--order", help="-created_at (newest first), name or loss")
    ps.add_argument("--limit", "-n", type=int, default=20, help="at most so many (default %(default)s)")
    add_json(ps)
    add_connection(ps)
    ps.set_defaults(run=_ps)
    one = subparsers.add_parser("show", help="show one run", description="Shows one run.", epilog=SHOW, formatter_class=raw)
    add_run(one)
    one.add_argument("--spec", action="store_true", help="print its spec as YAML")
    add_json(one)
    add_connection(one)
    one.set_defaults(run=_show)


def _ps(args: argparse.Namespace) -> int:
    filters = {name: getattr(args, name) for name in ("state", "tag", "q", "metric", "project", "starred", "archived", "order")}
    if args.state:
        filters["state"] = [state.strip() for state in args.state.split(",")]
    with connect(args) as client:
        runs = list(client.runs(limit=args.limit, **filters))
    if args.json:
        print_json(runs)
    elif runs:
        titles = ("RUN", "STATE", "NAME", "STEP", "OF", "LOSS", "VAL", "TOKENS/S", "LEFT", "AGE")
        print(table(titles, map(_row, runs), right=("RUN", "STEP", "OF", "LOSS", "VAL", "TOKENS/S", "LEFT", "AGE")))
    else:
        print("no runs")
    return exit_code.OK


def _row(run: dict[str, Any]) -> tuple[object, ...]:
    loss = run["summary"].get("lm_loss", run["summary"].get("loss"))
    state = run["state"] + (f" ({run['reason']})" if run["state"] == "failed" and run["reason"] else "")
    left = duration(run["seconds_left"]) if run["seconds_left"] else None
    return (
        run["id"],
        state,
        run["name"],
        run["last_step"],
        run["steps"] or None,
        loss,
        run["best_val_loss"],
        run["tokens_per_s"],
        left,
        age(run["created_at"]),
    )


def _show(args: argparse.Namespace) -> int:
    with connect(args) as client:
        run = client.run(args.run_id)
    if args.json:
        print_json(run)
    elif args.spec:
        import yaml

        print(yaml.safe_dump(run["spec"], sort_keys=False, allow_unicode=True), end="")
    else:
        print("\n".join(f"{label:<16}{value}" for label, value in _facts(run)))
    return exit_code.OK


def _node(node: dict[str, Any]) -> str:
    ended = f": {node['outcome']}" + (f" ({node['reason']})" if node["reason"] else "") if node["outcome"] else ""
    return f"{node['worker']} on {', '.join(node['devices'])}{ended}"


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    why = f" ({run['reason']})" if run["reason"] else ""
    facts: list[tuple[str, object]] = [
        ("run", f"{run['id']}  {show(run['name'])}"),
        ("state", run["state"] + why),
        ("detail", run["detail"]),
        ("project", run["project"]),
        ("owner", run["owner"]),
        ("tags", ", ".join(run["tags"])),
        ("progress", f"step {run['last_step']} of {run['steps'] or '?'} ({100 * run['progress']:.0f} %)"),
        ("left", duration(run["seconds_left"]) if run["seconds_left"] else ""),
        ("attempt", run["attempt"]),
        ("worker", f"{run['worker']} on {', '.join(run['devices'])}" if run["worker"] and not run["nodes"] else ""),
        *((f"node {node['rank']}", _node(node)) for node in run["nodes"]),
        ("parameters", f"{count(run['total_params'])}, {count(run['active_params'])} active"),
        ("experts", f"{run['experts']} in {len(run['moe_layers'])} layers, top {run['top_k']}" if run["experts"] else "none"),
        ("validation loss", run["best_val_loss"]),
        ("spikes", run["spikes"] or ""),
        ("created", run["created_at"]),
        ("ended", run["ended_at"]),
        ("page", run["url"]),
    ]
    facts += [(f"  {name}", value) for name, value in run["summary"].items()]
    return [(label, show(value)) for label, value in facts if value not in ("", None)]
