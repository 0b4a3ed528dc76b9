"""The search for tile sizes, with made-up times: what it tries, what it keeps, and what it writes is what `kernels.blocks` reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import kernels, tune
from kernels import blocks
from kernels.blocks import Blocks, usual_layer_blocks
from tests.kernels.test_blocks import assert_whole

SHAPE = kernels.Shape(tokens=16, width=16, expert_width=16, experts=4, top_k=2)
USUAL = usual_layer_blocks(9, 2, gated=True, width=16, expert_width=16)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> tuple[tune.Search, tune.Search]:
    """With tiles of 64 columns that run best in groups of four, in a loop where rows lie in order; and weights' gradients for which the usual
    tiles are best.
    """

    def times(works: dict[str, Any], until: float, rounds: int) -> dict[str, dict[str, float]]:
        found: dict[str, Any] = {}
        for name, (work, _) in works.items():
            of: Blocks = work.keywords.get("blocks") or work.args[-1]
            is_usual, slow = of in USUAL, (of.outer != 64) + (of.group != 4) + (of.rows != 64) + of.inner / 1000
            slow += 0.5 * (of.persistent and work.func is tune.grouped_gemm and work.keywords["gather"])  # the up-projection does not gain by it
            slow -= 0.1 * of.persistent
            found[name] = {"median_ms": 0.5 if is_usual and work.func is tune.weight_gradient else 1.0 + slow}
        return found | {"failed": {"error": "out of resources"}}

    monkeypatch.setattr(tune, "measure", times)
    monkeypatch.setattr(tune, "fits", lambda kernel, tiles, **_: tiles.warps == 4)
    torch.manual_seed(0)
    layer = kernels.Layer.random(SHAPE, "cpu")
    with ThreadPoolExecutor(1) as pool:
        return tune.search(SHAPE, layer, USUAL, 90, pool, float("inf"))


def test_the_fastest_tiles_that_fit_are_found(searched):
    base, best = searched
    assert {kernel: tiles for kernel, (tiles, _) in base.items()} == USUAL._asdict()
    for kernel in ("up", "down", "hidden", "input"):
        tiles, _ = best[kernel]
        assert (tiles.rows, tiles.outer, tiles.inner, tiles.warps, tiles.group) == (64, 64, 32, 4, 4)
    assert {kernel for kernel, (tiles, _) in best.items() if tiles.persistent} == {"down", "input"}


def test_what_is_written_is_read(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "TUNED", tmp_path / "tuned.json")
    blocks.TUNED.write_text('{"entries": []}')
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    entry = tune.entry(SHAPE, *searched, 90)
    for _ in range(2):
        tune.store(entry)
    ((case, layer, rest),) = blocks.tuned()
    assert_whole(blocks.TUNED)
    assert (case.width, case.expert_width, case.rows_per_expert) == (16, 16, 8)
    assert layer.up.outer == 64 and layer.weight_in == USUAL.weight_in and rest["microseconds"]["weight_in"] == [500.0, 500.0]


def test_without_a_device_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("is about a machine without a CUDA device")
    with pytest.raises(SystemExit, match="No CUDA device"):
        tune.main([])
