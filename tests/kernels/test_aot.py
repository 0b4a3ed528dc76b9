"""The Triton kernels compile for GPUs that are not here, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_compile_for_ampere_hopper_and_blackwell():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "kernels.aot"], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"sm_80", "sm_90", "sm_100"}
    assert all(kernels["grouped_gemm swiglu"]["matrix_instructions"] > 0 for kernels in figures.values())
    assert all(kernel["stack_bytes"] == 0 and kernel["registers"] > 0 for kernels in figures.values() for kernel in kernels.values())
