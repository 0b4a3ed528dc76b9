"""Whether Triton can launch kernels here. Each launcher is a small C module that it compiles on this machine when a kernel first runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec

import torch

_TIMEOUT_S = 60.0


def lacking() -> str | None:
    """What Triton lacks to launch kernels here, in words; None where it lacks nothing.

    A compiler is looked for where triton/runtime/build.py does: CC as one program, gcc, clang. Where there is a device it is tried as well.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC")
    if compiler is None:
        compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (gcc or clang)"
    if shutil.which(compiler) is None:
        return f"the C compiler that CC names, {compiler!r}, is not there"
    return complaint(compiler) if torch.cuda.is_available() else None


def complaint(compiler: str, include: str | None = None) -> str | None:
    """Why `compiler` would not compile a module for this Python, whose headers are in `include`; None where it would."""
    include = include or sysconfig.get_path("include", {"posix_local": "posix_prefix"}.get(scheme := sysconfig.get_default_scheme(), scheme))
    command = [compiler, "-fsyntax-only", "-x", "c", f"-I{include}", "-"]
    try:
        tried = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C compiler cannot be run: {error}"
    if tried.returncode == 0:
        return None
    told = next((line for line in tried.stderr.splitlines() if "error" in line), f"exit code {tried.returncode}")
    return f"the C compiler {compiler} cannot build modules for Python: {told.strip()}"
