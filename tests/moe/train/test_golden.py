"""The first losses of every small preset, as they always were, with and without recomputed activations.

Each preset trains as it is, on two sequences of 64 bytes of a fixed text a step. Losses differ between machines by rounding: TOLERANCE. Where one
token's choice moves others', or is drawn, rounding grows: AMPLIFIED, several times what weights changed by 3e-7 of themselves make, and
still far less than an error would. A change that is meant to change the losses is followed by

    python -m tests.moe.train.test_golden [PRESET…]
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.train.batches import Batches
from moe.train.corpus import Domain
from moe.train.learner import Learner
from moe.train.ranks import Ranks
from spec import presets
from spec.experiment import ExperimentSpec

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 2e-3
AMPLIFIED = {
    **{"nano-base": 0.15, "nano-gshard": 0.05, "nano-s-base": 0.03, "nano-rl-r": 0.02},
    **dict.fromkeys(("nano-hash", "nano-shazeer", "nano-st-moe", "nano-glam", "nano-switch", "nano-switch-xxl", "nano-deepspeed-moe"), 0.01),
    **dict.fromkeys(("nano-minimax", "nano-expert-choice"), 0.01),
}
STEPS, STEPS_AGAIN = 20, 4
NANO = [name for name in presets.names() if presets.describe(name).size == "nano"]


@cache
def text() -> Domain:
    """Sentences of numbers, as bytes; the last eighth is held out."""
    sentences = "".join(f"The square of {n} is {n * n}, its cube is {n**3}.\n" for n in range(400))
    tokens = np.frombuffer(sentences.encode(), np.uint8).astype(np.uint16)
    split = len(tokens) * 7 // 8
    return Domain("numbers", tokens[:split], tokens[split:])


def learner(name: str, *, recompute: bool = False, n_layers: int | None = None) -> Learner:
    """Preset `name`, shrunk to a batch of two sequences of 64 tokens (and to `n_layers`), at its beginning."""
    plain = presets.load(name).model_dump()
    plain["model"]["n_layers"] = n_layers or plain["model"]["n_layers"]
    plain["data"]["seq_len"] = 64
    plain["training"].update(batch_size=2, steps=STEPS, activation_recompute=recompute)
    plain["optimizer"]["warmup_steps"] = 4
    spec = ExperimentSpec.model_validate(plain)
    return Learner(spec, Batches([text()], 64, 2, spec.seed), Ranks(0, 1, torch.device("cpu")))


def losses(learning: Learner, steps: int) -> list[float]:
    """What was minimised, at each of the first `steps` steps."""
    torch.set_num_threads(1)
    return [learning.train_step(step, lambda: (False, False)).figures.loss for step in range(1, steps + 1)]


@pytest.mark.parametrize("name", NANO)
def test_a_preset_has_the_losses_it_always_had_and_the_same_when_activations_are_recomputed(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    plain = losses(learner(name), STEPS)
    assert plain == pytest.approx(golden, rel=AMPLIFIED.get(name, TOLERANCE))
    assert plain[-1] < 0.8 * plain[0]
    assert losses(learner(name, recompute=True), STEPS_AGAIN) == plain[:STEPS_AGAIN]


def test_the_selection_bias_of_deepseek_v3_keeps_up_with_its_router() -> None:
    """Every MoE layer works as if it had more than half of the experts between the k of a token and all; at the rate of the full size none does."""
    torch.set_num_threads(1)
    learning = learner("nano-deepseek-v3")
    steps = [learning.train_step(step, lambda: (False, False)).figures.tokens_LE for step in range(1, STEPS + 1)]
    tokens_LE = np.sum(steps[STEPS // 2 :], axis=0, dtype=np.float64)
    share_LE = tokens_LE / tokens_LE.sum(1, keepdims=True)
    effective_L = np.exp(-np.where(share_LE > 0, share_LE * np.log(np.maximum(share_LE, 1e-12)), 0).sum(1))
    assert effective_L.shape == (4,) and effective_L.min() > (4 + 32) / 2


def test_every_preset_has_its_losses_and_no_other_has() -> None:
    assert sorted(json.loads(GOLDEN.read_text())) == sorted(NANO)


def main(wanted: list[str]) -> None:
    """Writes the losses of `wanted` presets, or of all."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() and wanted else {}
    golden |= {name: [round(loss, 5) for loss in losses(learner(name), STEPS)] for name in wanted or NANO}
    lines = [f'  "{name}": {json.dumps(golden[name])}' for name in sorted(golden)]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
