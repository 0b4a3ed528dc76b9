"""A training step on CPUs against transformers' experts and a dense model of equal active FLOPs: `python -m benchmarks train_cpu`.

A step is forward, backward and fused AdamW on [8, 256] tokens, width 256, 4 layers, vocabulary 512. All models of one precision are
built first and then take turns, so that other load on the machine meets all alike; figures are medians. Our model also computes its
balancing loss and routing statistics, theirs only the cross-entropy. transformers' fastest experts here are grouped_mm; its eager ones, with
--eager, take part at everybody's cost in bfloat16: their many row counts drive all compiled products out of oneDNN's cache. `ratio` is our
tokens per second over those of the fastest implementation; `dense_ratio` our time over that of transformers' dense Llama with the same active
FLOPs; `cpu_ratio` and `dense_cpu_ratio` are the same by processor time, which says more on a busy machine.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from moe.model import build_model
from spec.model import Model

BATCH, LENGTH, WIDTH, LAYERS, HEADS, VOCABULARY, DENSE_FF = 8, 256, 256, 4, 4, 512, 1024
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A MoE as transformers and as we describe it; active FLOPs are those of the dense model."""

    n_experts: int
    top_k: int
    causal_lm: str
    qk_norm: str
    router: str


SHAPES = {
    "mixtral E8 k2": Shape(8, 2, "Mixtral", "none", "topk_softmax"),
    "olmoe E64 k8": Shape(64, 8, "Olmoe", "full", "softmax_topk"),
}


@dataclass
class Contestant:
    """A model with its optimiser, and the seconds of each of its steps."""

    model: nn.Module
    loss: Loss
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)

    def step(self, tokens: Tensor, targets: Tensor, *, bfloat16: bool) -> None:
        """One training step, timed."""
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = self.loss(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)


def ours(shape: Shape) -> Contestant:
    """moelab's model of this shape."""
    model = build_model(
        Model.model_validate(
            {
                "n_layers": LAYERS, "d_model": WIDTH, "vocab_size": VOCABULARY, "tie_embeddings": False,
                "attention": {"kind": "gqa", "n_heads": HEADS, "n_kv_heads": HEADS, "qk_norm": shape.qk_norm},
                "moe": {
                    "n_experts": shape.n_experts, "top_k": shape.top_k, "d_expert": DENSE_FF // shape.top_k,
                    "router": {"kind": shape.router},
                },
            }
        )
    )  # fmt: skip

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        output = model(tokens, targets)
        total: Tensor = output.lm_loss + output.balance_loss
        return total

    return Contestant(model, loss)


def theirs(causal_lm: str, implementation: str | None = None, **sizes: int) -> Contestant:
    """transformers' model of the same size, with one of its implementations of the experts."""
    config = getattr(transformers, f"{causal_lm}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH, tie_word_embeddings=False, eos_token_id=None, pad_token_id=None, **sizes,
    )  # fmt: skip
    model = getattr(transformers, f"{causal_lm}ForCausalLM")(config)
    if implementation is not None:
        model.set_experts_implementation(implementation)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Contestant(model, loss)


def their_experts(shape: Shape, implementation: str) -> Contestant:
    """transformers' MoE of this shape."""
    count = "num_local_experts" if shape.causal_lm == "Mixtral" else "num_experts"
    sizes = {count: shape.n_experts, "num_experts_per_tok": shape.top_k, "intermediate_size": DENSE_FF // shape.top_k}
    return theirs(shape.causal_lm, implementation, **sizes)


def cases(precision: str, shapes: Sequence[str], implementations: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Let all models of one precision take turns; one result for each shape."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH)).unbind()
    contestants: dict[tuple[str, str], Contestant] = {("", "dense"): theirs("Llama", intermediate_size=DENSE_FF)}
    for name in shapes:
        contestants[name, "ours"] = ours(SHAPES[name])
        contestants |= {(name, peer): their_experts(SHAPES[name], peer) for peer in implementations}
    for turn in range(steps + 2):
        for contestant in contestants.values():
            contestant.step(tokens, targets, bfloat16=precision == "bfloat16")
            if turn == 1:  # two steps to warm up
                contestant.wall_s.clear()
                contestant.cpu_s.clear()
    wall = {key: statistics.median(c.wall_s) for key, c in contestants.items()}
    cpu = {key: statistics.median(c.cpu_s) for key, c in contestants.items()}
    results = []
    for name in shapes:
        best, best_cpu = (min(implementations, key=lambda peer: seconds[name, peer]) for seconds in (wall, cpu))
        results.append(
            {
                "config": name,
                "precision": precision,
                "ours_tokens_per_s": round(BATCH * LENGTH / wall[name, "ours"]),
                "peer_tokens_per_s": round(BATCH * LENGTH / wall[name, best]),
                "peer_impl": best,
                "ratio": round(wall[name, best] / wall[name, "ours"], 3),
                "dense_ratio": round(wall[name, "ours"] / wall["", "dense"], 3),
                "cpu_ratio": round(cpu[name, best_cpu] / cpu[name, "ours"], 3),
                "dense_cpu_ratio": round(cpu[name, "ours"] / cpu["", "dense"], 3),
            }
        )
    return results


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """{cases: [{config, precision, ours_tokens_per_s, peer_tokens_per_s, peer_impl, ratio, dense_ratio, cpu_ratio, dense_cpu_ratio}]}."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks train_cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 steps each")
    parser.add_argument("--eager", action="store_true", help="transformers' eager experts too")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each model (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="only this one")
    parser.add_argument("--config", choices=list(SHAPES), help="only this one")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(logging.ERROR)
    implementations = ["grouped_mm", *(["eager"] if args.eager else [])]
    shapes = [args.config] if args.config else list(SHAPES)
    results = []
    for precision in [args.precision] if args.precision else ["float32", "bfloat16"]:
        for result in cases(precision, shapes, implementations, 5 if args.quick else args.steps):
            print(
                f"{result['config']:14s} {precision:9s} {result['ratio']:.2f} x {result['peer_impl']}, {result['dense_ratio']:.2f} of dense",
                flush=True,
            )
            results.append(result)
    return {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads, "cases": results}
