"""`moelab up`: everything on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

from moelab.cli import exit_code

EPILOG = """\
Starts PostgreSQL and Valkey (unless DATABASE_URL and REDIS_URL name yours), the web server, Celery beat and a worker, and
keeps them running. The files are in MOELAB_HOME (default: var/ of the project), logs in its log/.

Ctrl-C ends everything: runs in training save a checkpoint first and go on at the next start.
"""
_LOCAL = ("127.0.0.1", "localhost", "::1")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("up", help="start everything on this machine", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--no-worker", action="store_true", help="start no worker: runs wait for `moelab worker` elsewhere")
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `up` and `demo` share."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, or the next free one after it (default %(default)s)")
    parser.add_argument("--allow-remote", action="store_true", help="allow an address that other machines can reach; put TLS in front of it")


def check_address(args: argparse.Namespace) -> None:
    """Raises UsageError where other machines could reach us and nobody said that they may."""
    if args.host not in _LOCAL and not args.allow_remote:
        raise exit_code.UsageError(f"--host {args.host} can be reached by other machines; add --allow-remote if that is what you want")


def check_storage() -> None:
    """Raises UsageError where the worker would refuse its MOELAB_CHECKPOINTS."""
    from workers import storage

    try:
        storage.check_storage()
    except ValueError as error:
        raise exit_code.UsageError(str(error)) from error


def stop_on_signals() -> None:
    """SIGTERM and SIGHUP end us as Ctrl-C does; so does SIGINT where a shell started us in the background, which would ignore it."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, stop)


def run(args: argparse.Namespace) -> int:
    from moelab.home import home
    from moelab.stack import Stack, StackError

    check_address(args)
    if not args.no_worker:
        check_storage()
    stop_on_signals()
    try:
        with Stack(home(), host=args.host, port=args.port, worker=not args.no_worker) as stack:
            password = stack.home / "admin_password"
            print(f"moelab is up at {stack.url}\n  signed in once:  {stack.ticket}")
            if password.exists():
                print(f"  password:        in {password} (account admin)")
            print(f"  logs:            {stack.home / 'log'}\n  stop:            Ctrl-C", flush=True)
            stack.watch()
    except StackError as error:
        print(f"moelab up: {error}", file=sys.stderr)
        return exit_code.FAILED
    except KeyboardInterrupt:
        return exit_code.OK
    finally:
        sys.stdout.flush()
    return os.EX_OK
