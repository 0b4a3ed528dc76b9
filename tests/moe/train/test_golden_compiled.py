"""The golden losses again, with every block of every small preset through torch.compile."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.moe.train.test_golden import AMPLIFIED, GOLDEN, NANO, STEPS, STEPS_AGAIN, TOLERANCE, learner, losses

IN_PIECES = ("nano-base",)  # its auction goes on until the prices have settled: the compiler leaves such loops to Python
NO_COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="machine code wants a C++ compiler (g++ or clang++)")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


def compiled(name: str, backend: str, steps: int, *, recompute: bool = False) -> list[float]:
    """The losses of a preset whose blocks are compiled, each kind as one graph but for those of IN_PIECES."""
    learning = learner(name, recompute=recompute)
    learning.model.compile_blocks(backend, whole=name not in IN_PIECES)
    return losses(learning, steps)


@pytest.mark.parametrize("name", NANO)
def test_a_compiled_preset_has_its_losses_and_the_same_when_activations_are_recomputed(name: str) -> None:
    """Through the compiler's front end and its automatic differentiation, with torch's own kernels."""
    plain = compiled(name, "aot_eager", STEPS)
    assert plain == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=AMPLIFIED.get(name, TOLERANCE))
    assert compiled(name, "aot_eager", STEPS_AGAIN, recompute=True) == plain[:STEPS_AGAIN]


@NO_COMPILER
@pytest.mark.parametrize("name", ["nano-mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in NANO if name != "nano-mixtral")])
def test_compiled_to_machine_code_it_has_them_too(name: str) -> None:
    """It rounds otherwise than torch's kernels: where that has changed a token's expert, later losses differ by a hundredth."""
    golden = json.loads(GOLDEN.read_text())[name]
    found = compiled(name, "inductor", STEPS_AGAIN if name == "nano-mixtral" else STEPS)
    assert found[:STEPS_AGAIN] == pytest.approx(golden[:STEPS_AGAIN], rel=max(AMPLIFIED.get(name, 0), 1e-4))
    assert found == pytest.approx(golden[: len(found)], rel=max(AMPLIFIED.get(name, 0), 2e-2))
