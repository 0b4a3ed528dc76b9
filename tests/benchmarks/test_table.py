"""README's table of figures is what the records say."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks import table
from benchmarks.kernels import SHAPES


def test_readme_has_the_table_of_the_records():
    readme = table.README.read_text()
    assert table.written(readme, table.table()) == readme, "run `python -m benchmarks table`"


def test_figures_of_a_gpu_stand_beside_the_fastest_other_layer(tmp_path):
    (tmp_path / "cpu-2026-01-01.json").write_text(json.dumps(table.newest("cpu")))
    assert table.table(tmp_path).count(table.NOT_MEASURED) == len(SHAPES) + 1
    speeds = {"triton forward": 400.0, "grouped_mm forward": 200.0, "dense forward": 600.0, "triton forward+backward": 300.0}
    layers = {name: {"tflops_per_s": speed} for name, speed in speeds.items()} | {"scattermoe forward": {"error": "no room"}}
    versions = {"device": "Device", "torch": "1", "triton": "2"}
    training = {"targets": {name: {"value": value} for name, value in {"mfu": 0.365, "ratio": 1.42, "telemetry_percent": 0.7}.items()}}
    shapes = [{"shape": vars(SHAPES[1]), "layers": layers}, {"shape": vars(SHAPES[2]), "skipped": "no time was left"}]
    record = {"date": "2026-01-02", "versions": versions, "benchmark": {"shapes": shapes}, "training": training}
    (tmp_path / "gpu-2026-01-02-device.json").write_text(json.dumps(record))
    section = table.table(tmp_path)
    assert "400 TFLOP/s, 2.00 × the fastest other; 300 TFLOP/s |" in section
    assert "| 36.5%; 1.42 ×; 0.70 % of the step |" in section
    assert "On a GPU: Device, 2026-01-02, torch 1, triton 2." in section
    assert section.count(table.NOT_MEASURED) == len(SHAPES) - 1


def test_a_readme_without_a_place_for_it_is_an_error():
    with pytest.raises(ValueError, match="no place for the table"):
        table.written("# moelab", "| what |")
