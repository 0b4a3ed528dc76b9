"""Where Triton could not launch a kernel, something else runs the layer, and the run page says why."""

import shutil
from pathlib import Path

import pytest
import torch

from kernels import dispatch, launcher
from moe.train.compiler import check_compiler
from moe.train.stop import SpecRefused


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, the only one where programs are looked for."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def a_program(path: Path, does: str) -> str:
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_it_says_so(programs: Path) -> None:
    assert launcher.lacking() == "there is no C compiler (gcc or clang)"
    a_program(programs / "clang", "exit 0")
    assert launcher.lacking() is None


def test_what_cc_names_is_taken_as_triton_takes_it_as_one_program(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_program(programs / "gcc", "exit 0")
    for named in ("gcc-99", "gcc -m64", ""):
        monkeypatch.setenv("CC", named)
        assert launcher.lacking() == f"the C compiler that CC names, {named!r}, is not there"
    monkeypatch.setenv("CC", "gcc")
    assert launcher.lacking() is None


def test_beside_a_device_the_compiler_is_tried(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiler = a_program(programs / "gcc", "echo '<stdin>:1: fatal error: stdio.h: No such file' >&2; exit 1")
    found = launcher.lacking()
    assert found == f"the C compiler {compiler} cannot build modules for Python: <stdin>:1: fatal error: stdio.h: No such file"
    a_program(programs / "gcc", "exit 0")
    assert launcher.lacking() is None


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_real_compiler_needs_the_headers_of_python(tmp_path: Path) -> None:
    assert launcher.complaint("gcc") is None
    assert "Python.h" in str(launcher.complaint("gcc", str(tmp_path)))


def test_the_run_page_is_told_why_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_LACKS", "there is no C compiler (gcc or clang)")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    told = dispatch.implementations("cuda", torch.bfloat16, scored=(128, 8))
    assert (told["expert_ffn"], told["router"]) == ("grouped_mm", "torch")
    assert told["triton"] == "not used: there is no C compiler (gcc or clang)"
    assert "triton" not in dispatch.implementations("cpu", torch.bfloat16)
    monkeypatch.setattr(dispatch, "WANTED", "triton")
    with pytest.raises(ValueError, match=r"here: grouped_mm, naive \(not Triton: there is no C compiler"):
        dispatch.implementations("cuda", torch.bfloat16)


def test_layers_that_cannot_be_compiled_are_refused(programs: Path) -> None:
    with pytest.raises(SpecRefused, match=r"training.compile: needs kernels that Triton launches, but on this worker there is no C compiler"):
        check_compiler(torch.device("cuda"))
