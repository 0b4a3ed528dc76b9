"""Whether torch.compile can do its work on this machine."""

from __future__ import annotations

import torch

from kernels import launcher
from moe.train.stop import SpecRefused


def check_compiler(device: torch.device) -> None:
    """Raises SpecRefused where what the compiler writes for `device` could not be built."""
    if device.type == "cuda":
        if lacks := launcher.lacking():
            raise SpecRefused("training.compile", f"needs kernels that Triton launches, but on this worker {lacks}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise SpecRefused("training.compile", "needs a C++ compiler (g++ or clang++) on the worker, which has none") from error
