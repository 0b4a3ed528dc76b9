"""Which tiles a layer runs with: measured where there is an entry for its device and shape, the usual ones elsewhere."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import blocks
from kernels.blocks import Blocks, Case, LayerBlocks, mean_rows, usual_layer_blocks

CASE = Case("NVIDIA H100 80GB HBM3", "bfloat16", True, 2048, 768, 2048)
KERNELS = LayerBlocks._fields


def entry(**changes: Any) -> dict[str, Any]:
    sizes = {"rows": 128, "outer": 64, "inner": 32, "warps": 4, "stages": 5, "group": 4}
    return {
        **CASE._asdict(),
        "capability": 90,
        "date": "2026-01-01",
        "versions": {},
        "microseconds": {},
        "blocks": {kernel: sizes | changes.get(kernel, {}) for kernel in KERNELS},
    }


def written(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"entries": entries}))
    return path


def assert_whole(path: Path) -> None:
    for case, layer, rest in blocks.tuned(path):
        assert all(type(value) is type(like) for value, like in zip(case, CASE, strict=True))
        assert case.dtype in ("bfloat16", "float16", "float32") and case.rows_per_expert == mean_rows(case.rows_per_expert, 1)
        assert set(rest) == {"capability", "date", "versions", "microseconds"}
        assert date.fromisoformat(rest["date"]) and {"torch", "triton", "driver"} <= set(rest["versions"])
        assert set(rest["microseconds"]) == set(KERNELS)
        tuned, usual = map(sum, zip(*rest["microseconds"].values(), strict=True))
        assert 0 < tuned < usual
        for sizes in layer:
            assert all(size & (size - 1) == 0 for size in (sizes.rows, sizes.outer, sizes.inner, sizes.warps))
    cases = [case for case, *_ in blocks.tuned(path)]
    assert len(cases) == len(set(cases))


def test_the_file_holds_only_whole_measurements():
    assert_whole(blocks.TUNED)


def test_an_entry_is_taken_for_its_device_and_shape_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "TUNED", written(tmp_path / "tuned.json", entry(weight_in={"rows": 64})))
    monkeypatch.setattr(blocks, "_chosen", blocks._chosen.__wrapped__)
    found = blocks._chosen(CASE, 9, 2)
    assert found.up == found.input == Blocks(128, 64, 32, 4, 5, 4) and found.weight_in.rows == 64
    for other in (CASE._replace(device="NVIDIA H200"), CASE._replace(width=4096), CASE._replace(rows_per_expert=1024), CASE._replace(gated=False)):
        usual = usual_layer_blocks(9, 2, gated=other.gated, width=other.width, expert_width=other.expert_width)
        assert blocks._chosen(other, 9, 2) == usual != found


def test_an_entry_that_fits_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="different rows"):
        list(blocks.tuned(written(tmp_path / "a.json", entry(down={"rows": 64}))))
    with pytest.raises(TypeError, match="colour"):
        list(blocks.tuned(written(tmp_path / "b.json", entry(down={"colour": 1}))))
    with pytest.raises(KeyError, match="width"):
        list(blocks.tuned(written(tmp_path / "c.json", {name: value for name, value in entry().items() if name != "width"})))


def test_shapes_are_one_class_up_to_the_next_power_of_two():
    assert [mean_rows(rows, 64) for rows in (0, 64, 127, 128, 64 * 511, 64 * 512)] == [1, 1, 1, 2, 256, 512]


@pytest.mark.parametrize("generation", [8, 9, 10, 12])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("width", [100, 768, 2048])
def test_a_layers_tiles_have_the_same_rows(generation, element_bytes, width):
    found = usual_layer_blocks(generation, element_bytes, gated=True, width=width, expert_width=width)
    assert len({found.up.rows, found.down.rows, found.hidden.rows, found.input.rows}) == 1


def test_without_a_cuda_device_tiles_are_small():
    assert blocks.layer_blocks(torch.zeros(4, 8), 2, 8, 8, gated=True) == blocks.SMALL
