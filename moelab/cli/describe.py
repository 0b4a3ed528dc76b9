"""An experiment as it is given on the command line: a YAML or JSON file, or the name of a preset, with --set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.cli.exit_code import USAGE, UsageError

if TYPE_CHECKING:
    from spec.experiment import ExperimentSpec
    from spec.problems import Problem


def add_description(parser: argparse.ArgumentParser) -> None:
    """The positional SPEC and `--set`."""
    parser.add_argument("what", metavar="SPEC", help="a YAML or JSON file (- reads standard input), or the name of a preset (`moelab presets`)")
    add_set(parser)


def add_set(parser: argparse.ArgumentParser) -> None:
    """`--set PATH=VALUE`, any number of times."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change one field: --set model.moe.top_k=4 (YAML values; repeatable)"
    )


def overrides(assignments: list[str]) -> dict[str, Any]:
    """{dotted path: value} of PATH=VALUE texts. Raises UsageError."""
    from spec.yaml_text import YamlError, load

    changes = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise UsageError(f"--set {text}: write it as PATH=VALUE, as in model.moe.top_k=4")
        try:
            changes[path.strip()] = load(value)
        except YamlError as error:
            raise UsageError(f"--set {text}: {error}") from error
    return changes


def described(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments `spec` or `preset`, and `overrides`, of the client's methods. Raises UsageError."""
    changes = overrides(args.set)
    if args.what == "-":
        return {"spec": _fields(sys.stdin.read(), "standard input"), "overrides": changes}
    path = Path(args.what)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        try:
            return {"spec": _fields(path.read_text(encoding="utf-8"), str(path)), "overrides": changes}
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from error
    return {"preset": args.what, "overrides": changes}


def read_spec(args: argparse.Namespace) -> ExperimentSpec:
    """The spec of `described`, read here. Raises UsageError, or pydantic's ValidationError for fields at fault."""
    from spec import presets
    from spec.experiment import ExperimentSpec
    from spec.overrides import OverrideError, apply

    given = described(args)
    try:
        plain = given["spec"] if "spec" in given else presets.load(given["preset"]).model_dump(mode="json")
        return ExperimentSpec.model_validate(apply(plain, given["overrides"]))
    except (presets.UnknownPresetError, OverrideError) as error:
        raise UsageError(str(error)) from error


def tell(problems: Iterable[Problem]) -> int:
    """Says what is wrong with a spec, field by field, and returns the exit code for it."""
    for problem in problems:
        print(f"{problem.pointer or '/'}: {problem.detail}", file=sys.stderr)
    return USAGE


def _fields(text: str, where: str) -> dict[str, Any]:
    from spec.yaml_text import YamlError, load_mapping

    try:
        return load_mapping(text)
    except YamlError as error:
        raise UsageError(f"{where}: {error}") from error
