"""In bfloat16 the experts' matrices are cast once a step, however many micro-batches it has and whatever is recomputed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.experts import Experts
from moe.model import Transformer
from tests.moe.train.tiny import Run, tiny

STEPS = 3


class Casts(TorchDispatchMode):
    """Counts the casts of matrices of all experts of a layer, [4, …, …], from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.dim() == 3 and len(made) == 4 and made.dtype == torch.bfloat16:
            self.count += 1
        return made


def trained(out: Path, precision: str, *, once: bool = True) -> tuple[list[float], int, Run]:
    """Losses of the steps, and casts in each: a step of two micro-batches whose activations are recomputed."""
    run = Run(tiny(training={"precision": precision, "grad_accumulation": 2, "activation_recompute": True}), out)
    plain = nullcontext() if once else patch.object(Transformer, "experts_cast", lambda self, *_: nullcontext())
    with plain, Casts() as casts:
        losses = [run.learner.train_step(step, lambda: (False, False)).figures.loss for step in range(1, STEPS + 1)]
    assert casts.count % STEPS == 0
    return losses, casts.count // STEPS, run


def test_each_matrix_is_cast_once_a_step_and_the_copy_goes_with_it(tmp_path: Path) -> None:
    losses, casts, run = trained(tmp_path / "once", "bfloat16")
    again, more, _ = trained(tmp_path / "anew", "bfloat16", once=False)
    assert losses == again
    assert (casts, more) == (2 * 2, 2 * 2 * 2 * 2), "two matrices in two layers; else for each micro-batch, forward and again"
    assert all(module.casts is None for module in run.learner.model.modules() if isinstance(module, Experts))
    assert all(gradient.dtype == torch.float32 for gradient in run.learner.optimizer.tensors().values())


def test_float32_has_nothing_to_cast(tmp_path: Path) -> None:
    assert trained(tmp_path / "exact", "float32")[1] == 0
