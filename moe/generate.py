"""`python -m moe.generate RUN_DIR --prompt TEXT`: go on from a prompt with a checkpoint of a run, and say which experts did it.

Prints JSON, or writes it to --out. RUN_DIR is what `python -m moe.train --out` or a worker has made; the spec is its spec.json, unless
--spec names another. Exit codes: 0 written, 64 refused (the spec, the prompt), 66 no such checkpoint here, 70 error, 71 out of memory.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.train import stop

if TYPE_CHECKING:
    from moe.model import Transformer
    from moe.sample import Sampling, Written
    from moe.train.vocabulary import Vocabulary
    from spec.experiment import ExperimentSpec

NOT_HERE = 66
PROJECT = Path(__file__).resolve().parents[1]
_DIGITS = 4  # of a gate and a log-probability: what a page shows


class NotHere(Exception):
    """The run has no such checkpoint on this machine."""


def main(arguments: list[str]) -> int:
    """Writes, and returns the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in moe.train: threads that spin keep others from their core
    try:
        prompt = options.prompt if options.prompt_file is None else _read(options.prompt_file)
        answer = json.dumps(_answer(options, prompt), ensure_ascii=False, allow_nan=False)
        if options.out is None:
            print(answer)
        else:
            options.out.write_text(answer, encoding="utf-8")
    except NotHere as error:
        print(error, file=sys.stderr)
        return NOT_HERE
    except Exception as error:  # whatever goes wrong has an exit code and a last line that says it
        code, reason = stop.classify(error)
        if code == stop.ERROR:
            traceback.print_exc()
        print(f"{reason}: {error or type(error).__name__}", file=sys.stderr)
        return code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.generate", description="Go on from a prompt with a checkpoint of a run.")
    parser.add_argument("run_dir", type=Path, help="the run's directory")
    parser.add_argument("--spec", help="a .json or .yaml file, or the name of a preset (default: RUN_DIR/spec.json)")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--prompt", default="", help="the text to go on from (default: none, which begins a document)")
    parser.add_argument("--prompt-file", help="a file that holds the prompt; - reads it from standard input")
    parser.add_argument("--tokens", type=_whole(1, 1_000_000), default=64, help="tokens to write at most (default 64)")
    parser.add_argument("--temperature", type=_real(0, 100), default=0.8, help="divides the logits; 0 takes the most probable token (default 0.8)")
    parser.add_argument("--top-p", type=_real(1e-9, 1), default=1.0, help="draw from the most probable tokens of this mass (default 1)")
    parser.add_argument("--top-k", type=_whole(0, 2**31), default=0, help="draw from so many of the most probable tokens (default 0: all)")
    parser.add_argument("--seed", type=_whole(0, 2**63 - 1), default=0, help="the same seed draws the same text (default 0)")
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    return parser


def _whole(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        if not low <= (value := int(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return parse


def _real(low: float, high: float) -> Any:
    def parse(text: str) -> float:
        if not low <= (value := float(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    return parse


def _read(source: str) -> str:
    return sys.stdin.buffer.read().decode() if source == "-" else Path(source).read_text(encoding="utf-8")


def _answer(options: argparse.Namespace, prompt: str) -> dict[str, Any]:
    import torch

    from moe.sample import Sampling, write
    from moe.train import ranks
    from moe.train.description import read_spec

    started = time.monotonic()
    spec = read_spec(options.spec or str(options.run_dir / "spec.json"))
    ranks.set_threads(spec.parallel)
    step, model = load(options.run_dir, spec, options.step)
    vocabulary = _vocabulary(spec, options.run_dir)
    sampling = Sampling(options.tokens, options.temperature, options.top_p, options.top_k, options.seed)
    ids = vocabulary.encode([prompt])[0].tolist() or [vocabulary.separator]
    torch.manual_seed(sampling.seed)  # for routers that draw
    autocast = torch.autocast(model.embedding.weight.device.type, torch.bfloat16) if spec.training.precision == "bfloat16" else nullcontext()
    with autocast:
        written = write(model, ids, sampling, vocabulary_size=vocabulary.size, end=vocabulary.separator)
    return described(spec, step, vocabulary, sampling, written, time.monotonic() - started)


def load(run_dir: Path, spec: ExperimentSpec, step: int | None) -> tuple[int, Transformer]:
    """(step, model in evaluation mode) of a verified checkpoint, on MOELAB_DEVICE or the CPU. Raises NotHere, SpecRefused."""
    import torch
    from safetensors.torch import load_file

    from moe.model import build_model
    from moe.train import checkpoint

    directory = run_dir / "checkpoints"
    wanted = checkpoint.steps(directory)[-1:] if step is None else [step]
    if not wanted:
        raise NotHere(f"{directory} holds no checkpoint")
    path = directory / f"step-{wanted[0]:08d}"
    try:
        checkpoint.verify(path)
        weights = load_file(path / "model.safetensors")
    except (checkpoint.Damaged, OSError) as error:
        raise NotHere(f"no sound checkpoint at step {wanted[0]}: {error}") from error
    model = build_model(spec.model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise stop.SpecRefused("model", f"the checkpoint is of another model: {str(error).splitlines()[-1].strip()}") from error
    device = torch.device(os.environ.get("MOELAB_DEVICE", "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    return wanted[0], model.eval().to(device)


def _vocabulary(spec: ExperimentSpec, run_dir: Path) -> Vocabulary:
    """The run's own, where it has kept one; the text that byte pairs were learnt from may be gone."""
    from moe.train.corpus import vocabulary_of
    from moe.train.sources import sources
    from moe.train.vocabulary import KEPT, FromFile

    if spec.data.tokenizer != "byte" and (run_dir / KEPT).is_file():
        return FromFile(run_dir / KEPT, spec.data.separator)
    home = Path(os.environ.get("MOELAB_HOME") or PROJECT / "var")
    return vocabulary_of(spec.data, home, list(sources(spec.data, home)) if spec.data.tokenizer == "bpe" else [])


# ----- what is said of it


def described(spec: ExperimentSpec, step: int, vocabulary: Vocabulary, sampling: Sampling, written: Written, seconds: float) -> dict[str, Any]:
    """The answer as plain data. `usage` is [L][E]: how many of the tokens, the prompt's included, each expert took."""
    from moe.sample import depends_on_batch

    moe = spec.model.moe
    layers = list(spec.model.moe_layers())
    usage = [[0] * (moe.n_experts if moe else 0) for _ in layers]
    for experts_L in written.experts:
        for row, experts in zip(usage, experts_L, strict=True):
            for expert in experts:
                row[expert] += 1
    return {
        "step": step,
        "prompt_tokens": written.prompt_tokens,
        "stopped": "end_of_document" if written.ended else "length",
        "ids": written.ids,
        "texts": list(texts(vocabulary, written.ids)),
        "log_probs": [None if value is None else _short(value) for value in written.log_probs],
        "moe_layers": layers,
        "n_experts": moe.n_experts if moe else 0,
        "experts": written.experts,
        "gates": [[[_short(gate) for gate in gates] for gates in gates_L] for gates_L in written.gates],
        "usage": usage,
        "batch_dependent": depends_on_batch(spec.model),
        "notes": list(_notes(spec, len(written.ids))),
        "seconds": round(seconds, 3),
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def texts(vocabulary: Vocabulary, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text: a character of several tokens stands at its last. Control characters show as their pictures."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for place, token in enumerate(ids):
        alone = vocabulary.bytes_of[token] if token < vocabulary.size else b""
        following = ids[place + 1] if place + 1 < len(ids) else None
        final = following is None or following == vocabulary.separator
        yield "".join(_shown(char) for char in decoder.decode(alone, final=final))
        if final:
            decoder.reset()


def _shown(char: str) -> str:
    if unicodedata.category(char) == "Cc" and char not in "\t\n":
        return chr(0x2400 + ord(char)) if ord(char) < 0x20 else "\u2421" if char == "\x7f" else "\ufffd"
    return char


def _notes(spec: ExperimentSpec, tokens: int) -> Iterator[str]:
    from moe.sample import depends_on_batch

    moe = spec.model.moe
    if moe is not None and depends_on_batch(spec.model):
        why = "experts choose tokens" if moe.router.kind == "expert_choice" else "experts have a capacity"
        yield f"The choices depend on the batch, because {why}: they are those of this text routed as a whole, and change with what follows."
    if moe is not None and moe.router.kind == "random":
        yield "The router draws experts at random: another seed gives others."
    if tokens > spec.data.seq_len:
        yield f"The text is longer than the {spec.data.seq_len} tokens that the model was trained on at a time."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
