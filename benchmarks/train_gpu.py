"""A whole training step on one CUDA device, against transformers' model of the same shape: `python -m benchmarks train_gpu` (a part of `make gpu`).

The stack is four of the sixteen layers of OLMoE-1B-7B (1.3 B active of 6.9 B parameters; Muennighoff 2024), so that two models with float32
weights, gradients and AdamW's moments fit on 80 GB together: width 2048, 16 heads, 64 SwiGLU experts of 1024 of which 8 are chosen,
vocabulary 50,304; 1.9 B parameters. A step is four micro-batches of 2 x 4096 random tokens: forward, backward, clipping, fused AdamW, in bfloat16.

Ours is `moe.train` as it runs, with telemetry at every step, its spool, and the balancing loss; theirs takes the same batches, loaded alike, and
minimises the cross-entropy alone. They take turns of TURN steps, so that both meet the same clocks, and times are medians. MFU is the accountant's
FLOPs over the device's dense peak. `telemetry_percent` is the median difference of turns with all telemetry and without any, in turns again.
`waits` is how often a step made the host wait for the device (torch's sync debug mode).
"""

# ruff: noqa: N806 - names of tensors carry their shape
from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from sys import stderr
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch.nn import functional

from benchmarks.telemetry_overhead import without_statistics
from moe.train.batches import Batches
from moe.train.chronicle import implementations
from moe.train.corpus import Domain
from moe.train.learner import Learner
from moe.train.loader import Loader
from moe.train.loop import Training
from moe.train.ranks import Ranks
from moe.train.stop import Requests
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.peak import peak_flop_per_s

PRECISION = "bfloat16"
IMPLEMENTATIONS = ("grouped_mm", "eager")  # of transformers' experts; batched_mm would copy a weight for every row
WARM_UP, ROUNDS, TURN = 2, 10, 2
LEAST_MFU, LEAST_RATIO, MOST_TELEMETRY_PERCENT = 0.35, 1.3, 1.0
Work = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A stack of MoE layers between embedding and head, and what it is trained on: `micro_batches` of `sequences` of `length` tokens."""

    layers: int
    width: int
    heads: int
    experts: int
    top_k: int
    expert_width: int
    vocabulary: int
    micro_batches: int
    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batches * self.sequences * self.length


STACK = Shape(4, 2048, 16, 64, 8, 1024, 50304, 4, 2, 4096)


def spec_of(shape: Shape) -> ExperimentSpec:
    """The stack as an experiment."""
    return ExperimentSpec.model_validate(
        {
            "name": "train_gpu",
            "model": {
                "n_layers": shape.layers, "d_model": shape.width, "vocab_size": shape.vocabulary, "tie_embeddings": False,
                "attention": {"kind": "gqa", "n_heads": shape.heads, "n_kv_heads": shape.heads, "qk_norm": "full"},
                "moe": {
                    "n_experts": shape.experts, "top_k": shape.top_k, "d_expert": shape.expert_width, "router": {"kind": "softmax_topk"},
                    "balance": [{"kind": "switch_aux"}, {"kind": "z_loss"}],
                },
            },
            "data": {"seq_len": shape.length},
            "training": {
                "steps": 1_000_000, "batch_size": shape.micro_batches * shape.sequences, "grad_accumulation": shape.micro_batches,
                "precision": PRECISION, "eval_every": 0, "checkpoint_every": 0,
            },
        }
    )  # fmt: skip


def random_batches(shape: Shape) -> Batches:
    """Uniform tokens: what the router makes of them is as uneven as its first weights are."""
    stream = np.random.Generator(np.random.Philox(0)).integers(0, shape.vocabulary, 64 * (shape.tokens + 1), dtype=np.uint16)
    return Batches([Domain("random", stream, stream)], shape.length, shape.micro_batches * shape.sequences, seed=0)


def ours(shape: Shape, batches: Batches, device: torch.device, directory: Path) -> Training:
    """The run, ready for its first step; nothing is saved, so it needs no room for checkpoints."""
    spec = spec_of(shape)
    with patch("moe.train.handing.check_room"):
        return Training(spec, Learner(spec, batches, Ranks(0, 1, device)), directory, 0, Requests())


class Theirs:
    """transformers' OLMoE of the shape, trained as its users do: autocast over float32 weights, and torch's fused AdamW."""

    def __init__(self, shape: Shape, batches: Batches, device: torch.device) -> None:
        config = transformers.OlmoeConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads, intermediate_size=shape.expert_width, num_experts=shape.experts, num_experts_per_tok=shape.top_k,
            max_position_embeddings=shape.length, tie_word_embeddings=False, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            self.model = transformers.OlmoeForCausalLM(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self._loader = Loader(batches, shape.micro_batches, Ranks(0, 1, device), ahead=device.type == "cuda")
        self._micros, self._step = shape.micro_batches, 0

    def step(self, implementation: str) -> None:
        """One training step with one of transformers' implementations of the experts."""
        self.model.set_experts_implementation(implementation)
        self._step += 1
        for tokens_BS, targets_BS in self._loader.micro_batches(self._step):
            with torch.autocast(tokens_BS.device.type, torch.bfloat16):
                logits = self.model(input_ids=tokens_BS, use_cache=False).logits
                loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets_BS.flatten())
            (loss / self._micros).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Ends the loader's thread."""
        self._loader.close()


def seconds(work: Work, device: torch.device) -> float:
    """Of one `work` of a turn of TURN, the device's part included."""
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(TURN):
        work()
    _synchronise(device)
    return (time.perf_counter() - started) / TURN


def take_turns(works: dict[str, Work], device: torch.device, rounds: int, until: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each work in each round, and the errors of those that do not run here. After `until` no round begins but the first."""
    errors: dict[str, str] = {}
    for name, work in works.items():
        try:
            for _ in range(WARM_UP):
                work()
        except Exception as error:  # whatever stops one of them is a figure of the others' too
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    running = {name: work for name, work in works.items() if name not in errors}
    times: dict[str, list[float]] = {name: [] for name in running}
    for done in range(rounds):
        if done and time.monotonic() > until:
            break
        for name, work in running.items():
            times[name].append(seconds(work, device))
    return times, errors


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits(training: Training) -> int | None:
    """How often a step waits for the device before its figures are read; None on a CPU, where nothing else is possible."""
    if training.ranks.device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.learner.make_step(training.position.step + 1, lambda: (False, False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def telemetry_percent(training: Training, rounds: int, until: float) -> float:
    """What all telemetry adds to a step that has none, in percent of it: the median of rounds in changing order, at least two until `until`."""
    device, learner = training.ranks.device, training.learner

    def silent() -> None:
        training.position.step += 1
        with without_statistics():
            learner.learn(training.position.step, 0.0)

    pairs = []
    for turn in range(rounds + 1):
        if turn > 2 and time.monotonic() > until:
            break
        works = (training.train_step, silent) if turn % 2 else (silent, training.train_step)
        found = {work.__name__: seconds(work, device) for work in works}
        training.catch_up()
        pairs.append((found["train_step"], found["silent"]))
    return 100 * statistics.median((told_s - silent_s) / silent_s for told_s, silent_s in pairs[1:])


def benchmark(shape: Shape = STACK, device_name: str = "cuda", rounds: int = ROUNDS, seconds: float = math.inf) -> dict[str, Any]:
    """The figures, with the targets and whether they were reached; None where this device cannot tell, or ours did not run (see `errors`).

    There are `rounds` of each comparison, fewer where they would take more than `seconds` together.
    """
    started = time.monotonic()
    device = torch.device(device_name)
    spec, batches = spec_of(shape), random_batches(shape)
    percent, waited = None, None
    with tempfile.TemporaryDirectory(prefix="moelab-train-gpu-") as directory, redirect_stdout(stderr):
        training, peer = ours(shape, batches, device, Path(directory)), Theirs(shape, batches, device)
        works: dict[str, Work] = {"ours": training.train_step} | {name: _of(peer, name) for name in IMPLEMENTATIONS}
        times, errors = take_turns(works, device, rounds, started + seconds * 0.7)
        if "ours" not in errors:
            training.catch_up()
            percent, waited = telemetry_percent(training, rounds, started + seconds * 0.9), waits(training)
        training.close()
        peer.close()
    step_s = {name: statistics.median(series) for name, series in times.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    cost, peak = price(spec), peak_flop_per_s(name, PRECISION)
    flop_per_s = cost.flops_per_token.training * shape.tokens / step_s["ours"] if "ours" in step_s else None
    best = min((name for name in IMPLEMENTATIONS if name in step_s), key=lambda name: step_s[name], default=None)
    return {
        "shape": asdict(shape), "total_params": cost.total_params, "active_params": cost.active_params.with_embeddings, "precision": PRECISION,
        "tokens_per_step": shape.tokens, "flops_per_token": cost.flops_per_token.training, "ops": implementations(spec, device),
        "step_ms": {name: _spread_ms(series) for name, series in times.items()}, "errors": errors,
        "tokens_per_s": {name: round(shape.tokens / median, 1) for name, median in step_s.items()},
        "tflop_per_s": flop_per_s and flop_per_s / 1e12, "peer": best,
        "memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "targets": {
            "mfu": _target(flop_per_s / peak if flop_per_s and peak else None, lambda mfu: mfu >= LEAST_MFU, LEAST_MFU),
            "ratio": _target(step_s[best] / step_s["ours"] if best and "ours" in step_s else None, lambda ratio: ratio >= LEAST_RATIO, LEAST_RATIO),
            "telemetry_percent": _target(percent, lambda found: found <= MOST_TELEMETRY_PERCENT, MOST_TELEMETRY_PERCENT),
            "waits": _target(waited, lambda found: found == 0, 0),
        },
    }  # fmt: skip


def _of(peer: Theirs, implementation: str) -> Work:
    return lambda: peer.step(implementation)


def _spread_ms(series: list[float]) -> dict[str, float]:
    figures = {"median": statistics.median(series), "fastest": min(series), "slowest": max(series)}
    return {name: round(1000 * figure, 3) for name, figure in figures.items()}


def _target(value: float | None, reaches: Callable[[float], bool], target: float) -> dict[str, Any]:
    return {"value": value, "target": target, "reached": None if value is None else reaches(value)}


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of STACK on the CUDA device."""
    argparse.ArgumentParser(prog="python -m benchmarks train_gpu", description=__doc__).parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device: this figure needs one.")
    return benchmark()
