"""`python -m moe.huggingface COMMAND`: checkpoints of Hugging Face in and out, with no service anywhere.

    import DIR --out OUT           config.json and safetensors to OUT/spec.json and OUT/model.safetensors, which `export` takes too
    export RUN --out DIR           a run's directory, one of its checkpoints, or an import, to what transformers loads
    report DIR                     where every tensor of DIR would go; nothing is written

Exit codes: 0 done, 64 refused (one line for each reason), 70 error.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from moe.huggingface.report import Report
    from spec.experiment import ExperimentSpec

REFUSED, ERROR = 64, 70


def main(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        report: Report = {"import": _import, "export": _export, "report": _report}[options.command](options)
    except (ValueError, OSError) as error:  # ConfigError, WeightsError, SpecRefused, Damaged and what is wrong with files
        for problem in getattr(error, "problems", None) or [error]:
            print(problem, file=sys.stderr)
        return REFUSED
    except Exception:
        traceback.print_exc()
        return ERROR
    print(report.json() if options.json else report.text())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.huggingface", description="Checkpoints of Hugging Face, in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    read = commands.add_parser("import", help="their weights to a spec and ours")
    read.add_argument("directory", type=Path, help="a directory with config.json and *.safetensors")
    read.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    told = commands.add_parser("report", help="where every tensor would go")
    told.add_argument("directory", type=Path, help="a directory with config.json and *.safetensors")
    write = commands.add_parser("export", help="our weights to what transformers loads")
    write.add_argument("run", type=Path, help="a run's directory, a checkpoint in it, or what an import wrote")
    write.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    write.add_argument("--spec", help="a .json or .yaml file, or a preset, where the run has no spec.json")
    write.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    write.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default float32)")
    write.add_argument("--max-shard-bytes", type=int, default=5 * 10**9, help="largest file (default 5000000000)")
    write.add_argument("--family", help="a model_type (default: the first that can say what the model computes)")
    for command in (read, told, write):
        command.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _report(options: argparse.Namespace) -> Report:
    import torch

    from moe.huggingface.load import joined
    from moe.huggingface.report import Report
    from moe.huggingface.source import Source, read_config
    from moe.model import build_model
    from spec.huggingface import family_of, read_model

    config = read_config(options.directory)
    spec, notes = read_model(config)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build_model(spec).state_dict().items()}
    report = Report(family_of(config).model_type, notes=notes)
    for _ in joined(Source(options.directory), spec, config, shapes, report):
        pass
    return report


def _import(options: argparse.Namespace) -> Report:
    from safetensors.torch import save_file

    from moe.huggingface.export import copy_tokenizer
    from moe.huggingface.load import load
    from moe.huggingface.source import WeightsError, read_config
    from moe.model import build_model
    from spec.huggingface import experiment_of

    tokenizer = options.directory.absolute() / "tokenizer.json"
    spec = experiment_of(read_config(options.directory), options.directory.name, str(tokenizer) if tokenizer.is_file() else None)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise WeightsError(f"{options.out} is not a new or empty directory")
    model = build_model(spec.model)
    report = load(options.directory, model)
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, options.out / "model.safetensors")
    report.notes.append(copy_tokenizer(options.directory, options.out))
    (options.out / "spec.json").write_text(json.dumps(spec.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    (options.out / "report.json").write_text(report.json() + "\n", encoding="utf-8")
    return report


def _export(options: argparse.Namespace) -> Report:
    from moe.huggingface.export import export

    weights, spec, home = _weights(options)
    return export(
        weights,
        spec.model,
        options.out,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
        max_len=spec.data.seq_len,
        family=options.family,
        tokenizer=home,
    )


def _weights(options: argparse.Namespace) -> tuple[dict[str, Tensor], ExperimentSpec, Path]:
    """Tensors, spec and the directory beside them, of a run's newest checkpoint, a checkpoint's directory, or an import. Raises WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from moe.huggingface.source import WeightsError
    from moe.train import checkpoint
    from moe.train.description import read_spec

    run: Path = options.run
    if (run / "model.safetensors").is_file():
        path, home = run, run if (run / "spec.json").is_file() else run.parent.parent
    else:
        steps = checkpoint.steps(run / "checkpoints")
        if not steps or options.step not in (None, *steps):
            wanted = "no checkpoint" if options.step is None else f"no checkpoint of step {options.step}, only {', '.join(map(str, steps)) or 'none'}"
            raise WeightsError(f"{run} holds {wanted}")
        path, home = run / "checkpoints" / f"step-{steps[-1] if options.step is None else options.step:08d}", run
    if (path / checkpoint.MANIFEST).is_file():
        try:
            checkpoint.verify(path)
        except checkpoint.Damaged as error:
            raise WeightsError(str(error)) from error
    if options.spec is None and not (home / "spec.json").is_file():
        raise WeightsError(f"{home} holds no spec.json: name the spec with --spec")
    try:
        spec = read_spec(options.spec or str(home / "spec.json"))
    except Exception as error:
        raise WeightsError(f"the spec: {error}") from error
    try:
        return load_file(path / "model.safetensors"), spec, home
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path / 'model.safetensors'} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
