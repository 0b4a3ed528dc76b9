"""`moelab import`: a published checkpoint's config.json as a spec. `moelab export-model`: a run's weights as transformers loads them.

Neither needs a server, but for a run that this machine has not trained: then the server knows where in the shared storage it is.
The weights are read and written by `python -m moe.huggingface`, a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.cli import exit_code

if TYPE_CHECKING:
    from moelab.cli import Subparsers

IMPORT_EPILOG = """\
examples:
  moelab import ~/models/OLMoE-1B-7B > olmoe.yaml       from a directory with a config.json, or from the file
  moelab import ~/models/OLMoE-1B-7B --weights ours     the weights too, as our checkpoints have them
"""
EXPORT_EPILOG = """\
examples:
  moelab export-model 12 --out ~/models/mine            the newest checkpoint of a run on this machine, or in the storage
  moelab export-model 12 --out ~/models/mine --step 500 --dtype bfloat16
"""


def add_parser(subparsers: Subparsers) -> None:
    read = subparsers.add_parser(
        "import",
        help="turn a Hugging Face checkpoint's config.json into a spec",
        description="Prints the spec of a published checkpoint as YAML; fields that cannot be carried over are named.",
        epilog=IMPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    read.add_argument("directory", type=Path, metavar="DIR", help="a directory with a config.json, or the file itself")
    read.add_argument("--weights", type=Path, metavar="OUT", help="also write spec.json and our weights into this new directory")
    read.set_defaults(run=run_import)
    write = subparsers.add_parser(
        "export-model",
        help="write a run's weights as transformers loads them",
        description="Writes config.json, safetensors and tokenizer files of a checkpoint, in the family that can say what the model computes.",
        epilog=EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    write.add_argument("what", metavar="RUN", help="a run's number, its directory, a checkpoint's directory, or what an import wrote")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    write.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    write.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default float32)")
    write.add_argument("--max-shard-bytes", type=int, metavar="N", help="largest file (default 5000000000)")
    write.add_argument("--family", help="a model_type (default: the first that can say what the model computes)")
    write.add_argument("--spec", help="a .json or .yaml file, or a preset, where the run's directory has no spec.json")
    write.set_defaults(run=run_export)


def run_import(args: argparse.Namespace) -> int:
    from spec import yaml_text
    from spec.huggingface import ConfigError, experiment_of, read_model

    path: Path = args.directory
    file = path / "config.json" if path.is_dir() else path
    tokenizer = file.absolute().parent / "tokenizer.json"
    config = _config(file)
    try:
        spec = experiment_of(config, file.absolute().parent.name, str(tokenizer) if tokenizer.is_file() else None)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return exit_code.USAGE
    for note in read_model(config)[1]:
        print(note, file=sys.stderr)
    print(yaml_text.dump(spec), end="")
    if args.weights is None:
        return exit_code.OK
    return _run("import", str(file.parent), "--out", str(args.weights), quiet=True)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise exit_code.UsageError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise exit_code.UsageError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise exit_code.UsageError(f"{file}: a config.json is a mapping of fields")
    return config


def run_export(args: argparse.Namespace) -> int:
    from moelab.home import home, runs_dir

    what = str(args.what)
    numbered = what.isascii() and what.isdigit() and not Path(what).exists()
    run = runs_dir() / what if numbered else Path(what)
    if run.is_dir():
        return _export(run, args)
    if not numbered:
        raise exit_code.UsageError(f"{run} is not a directory on this machine")
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="export-", dir=home()) as scratch:
        _fetch(int(what), args.step, Path(scratch))
        return _export(Path(scratch), args)


def _fetch(run: int, step: int | None, run_dir: Path) -> None:
    """Brings a checkpoint of the run from the storage that this machine shares. Raises UsageError, which says where it is or what to do."""
    from moelab.client import ApiError, Client, ServerUnreachable
    from workers.fetch import Wanted, fetch
    from workers.manifest import NotWhole
    from workers.storage import Away, storage_url

    try:
        with Client() as client:
            rows = [row for row in client.checkpoints(run) if step is None or row["step"] == step]
            spec, url = client.run(run)["spec"], storage_url()
    except (ApiError, ServerUnreachable, ValueError) as error:
        raise exit_code.UsageError(f"run {run} is not on this machine, and no server says where it is: {error}") from error
    stored = next((row for row in rows if row["stored_at"]), None)
    if stored is None:
        hosts = ", ".join(sorted({row["host"] for row in rows if row["host"] and not row["deleted"]})) or "the host that trained it"
        raise exit_code.UsageError(f"run {run} is not on this machine, nor in a storage: export it on {hosts}")
    if not url or not stored["stored_at"].startswith(f"{url}/"):
        base = stored["stored_at"].rsplit("/", 3)[0]
        raise exit_code.UsageError(f"run {run} is not on this machine; with MOELAB_CHECKPOINTS={base} it is fetched from there")
    (run_dir / "spec.json").write_text(json.dumps(spec))
    try:
        fetch(Wanted(place=stored["stored_at"].removeprefix(f"{url}/"), sha256=stored["sha256"], run_dir=run_dir))
    except (Away, NotWhole, ValueError, OSError) as error:
        raise exit_code.UsageError(f"{stored['stored_at']} could not be fetched: {error}") from error


def _export(run: Path, args: argparse.Namespace) -> int:
    given = {"--step": args.step, "--max-shard-bytes": args.max_shard_bytes, "--family": args.family, "--spec": args.spec}
    options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    return _run("export", str(run), "--out", str(args.out), "--dtype", args.dtype, *options)


def _run(*arguments: str, quiet: bool = False) -> int:
    """Runs `python -m moe.huggingface`, and returns our exit code; torch stays out of this process."""
    command = [sys.executable, "-m", "moe.huggingface", *arguments]
    done = subprocess.run(command, stdout=sys.stderr if quiet else None, check=False)
    return {0: exit_code.OK, 64: exit_code.USAGE}.get(done.returncode, exit_code.FAILED)
