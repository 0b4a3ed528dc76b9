"""`moelab demo`: the main job in one command. A small MoE learns real text while its page shows the router live."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moelab.cli import exit_code
from moelab.cli.describe import add_set, overrides
from moelab.cli.up import add_arguments, check_address, check_storage, stop_on_signals

if TYPE_CHECKING:
    from moelab.client import Client
    from moelab.stack import Stack


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="start everything, train a small MoE and show its live page")
    add_arguments(parser)
    parser.add_argument("--preset", default="nano-mixtral", help="which preset to train (default %(default)s)")
    add_set(parser)
    parser.add_argument("--exit", action="store_true", help="stop when the run has ended, and print one line of JSON about it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from moelab.client import Client
    from moelab.home import home
    from moelab.stack import Stack, StackError

    check_address(args)
    check_storage()
    changes = overrides(args.set)
    stop_on_signals()
    started = time.monotonic()
    try:
        with Stack(home(), host=args.host, port=args.port, say=_say) as stack:
            client = Client(stack.url, stack.token)
            run_id = client.submit(preset=args.preset, overrides=changes, name=f"demo {args.preset}", tags=["demo"])["id"]
            _say(f"run {run_id} is submitted. Watch it live:\n\n    {stack.ticket}?next=/runs/{run_id}/\n")
            last = _follow(client, stack, run_id)
            summary = _summary(client, last, time.monotonic() - started)
            if args.exit:
                print(json.dumps(summary), flush=True)
                return exit_code.for_state(last["state"])
            _say(f"run {run_id} has {last['state']}: {json.dumps(summary)}\nmoelab keeps serving at {stack.url}; stop it with Ctrl-C")
            stack.watch()
    except StackError as error:
        print(f"moelab demo: {error}", file=sys.stderr)
        return exit_code.FAILED
    except KeyboardInterrupt:
        pass
    return exit_code.OK


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _follow(client: Client, stack: Stack, run_id: int) -> dict[str, Any]:
    """Prints the run's progress, one line a second where it changed, until it has ended. Returns the run as it is then."""
    from moelab.client import TERMINAL, ApiError, ServerUnreachable

    shown: tuple[str, int] = ("", -1)
    run: dict[str, Any] = {}
    while run.get("state") not in TERMINAL:
        stack.revive()
        try:
            run = client.run(run_id)
        except ServerUnreachable:
            time.sleep(0.5)
            continue
        except ApiError as error:
            if error.status < 500:
                raise
            time.sleep(0.5)
            continue
        if (now := (run["state"], run["last_step"])) != shown:
            shown = now
            _say(_line(run))
        time.sleep(1.0)
    return run


def _line(run: dict[str, Any]) -> str:
    summary, text = run["summary"], f"{run['state']:<10}"
    if not run["last_step"]:
        return text
    text += f" step {run['last_step']:>5}/{run['steps']}  loss {_number(summary.get('lm_loss'), 4)}  {_number(run['tokens_per_s'], 0)} tokens/s"
    if (mfu := summary.get("mfu")) is not None:
        text += f" ({mfu:.1%} MFU)"
    text += f"  MaxVio {_number(summary.get('max_vio'), 2)}  dead experts {_number(summary.get('dead_experts'), 0)}"
    return text + (f"  {run['seconds_left']:.0f} s left" if run["seconds_left"] else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _summary(client: Client, run: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What the demo promises to print; losses and rows are read back from the store, not remembered."""
    steps = client.steps(run["id"], scalars=["lm_loss"], tensors=["expert_tokens"], points=2000)
    losses: Sequence[float] = steps.scalar("lm_loss").tolist() if run["last_step"] else []
    counts = steps.arrays.get("expert_tokens")
    return {
        "run": run["id"],
        "state": run["state"],
        "steps": run["last_step"],
        "layers": len(run["moe_layers"]),
        "experts": run["experts"],
        "first_loss": round(losses[0], 4) if len(losses) else None,
        "last_loss": round(losses[-1], 4) if len(losses) else None,
        "val_loss": run["best_val_loss"],
        "routing_rows": 0 if counts is None else int(steps.arrays["n"].sum()) * counts.shape[1],
        "tokens_per_s": run["tokens_per_s"],
        "seconds": round(seconds, 1),
    }
