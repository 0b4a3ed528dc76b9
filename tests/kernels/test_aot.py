"""The Triton kernels compile for GPUs that are not here, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_ampere_hopper_and_blackwell():
    done = run("-m", "kernels.aot")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == {"sm_80", "sm_90", "sm_100"}
    assert all(kernel["stack_bytes"] == 0 and kernel["registers"] > 0 for kernels in figures.values() for kernel in kernels.values())
    up, down = figures["sm_90"]["up"], figures["sm_90"]["down"]
    assert up["matrix_instructions"] > 0 and up["tma_loads"] > 0 and up["cp_async"] > 0  # gathered rows beside tiles of weights, in one loop
    assert down["tma_loads"] > 0 and down["tma_stores"] > 0 and down["cp_async"] == 0
    assert {"HGMMA", "UTMALDG", "LDGSTS"} <= set(up["sass"]) and {"HGMMA", "UTMALDG", "UTMASTG"} == set(down["sass"])
    assert figures["sm_80"]["up"]["tma_loads"] == 0 < figures["sm_80"]["up"]["sass"]["HMMA"]


@pytest.mark.slow
def test_tiles_that_do_not_fit_are_told_from_those_that_do():
    search = "from benchmarks.tune import fits, Blocks; given = dict(dtype='bf16', capability=90, even=True)"
    tried = "print([fits('up', Blocks(128, outer, 64, 8, stages), **given) for outer, stages in ((128, 4), (256, 5), (128, 6))])"
    done = run("-c", f"{search}\n{tried}")
    assert done.stdout.split() == ["[True,", "False,", "False]"], done.stderr
