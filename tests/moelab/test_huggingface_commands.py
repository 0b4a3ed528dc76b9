"""`moelab import` and `moelab export-model`: a spec from a config.json; weights by a process of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelab.cli import exit_code, main
from spec.experiment import ExperimentSpec
from spec.huggingface import model_of
from spec.yaml_text import load_mapping
from tests.spec.test_huggingface import CONFIGS

TINY = {
    **CONFIGS["Mixtral-8x7B"][1],
    **{"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264},
}


def directory(path: Path, config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("as_file", [False, True])
def test_a_config_becomes_yaml(as_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = directory(tmp_path / "scout", CONFIGS["Llama 4 Scout"][1])
    (where / "tokenizer.json").write_text("{}")
    assert main(["import", str(where / "config.json" if as_file else where)]) == exit_code.OK
    spec = ExperimentSpec.model_validate(load_mapping(capsys.readouterr().out))
    assert spec.model == model_of(CONFIGS["Llama 4 Scout"][1])
    assert spec.name == "scout" and spec.data.tokenizer_path == str(where / "tokenizer.json")


def test_what_is_left_behind_is_told_beside_the_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(directory(tmp_path / "v3", CONFIGS["DeepSeek-V3"][1]))]) == exit_code.OK
    assert capsys.readouterr().err.startswith("num_nextn_predict_layers 1 is left behind")


def test_problems_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(directory(tmp_path / "odd", {**TINY, "mystery": 1, "hidden_act": "relu"}))]) == exit_code.USAGE
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["hidden_act", "mystery"]
    for content, said in (("{", "not JSON"), ("[]", "a mapping of fields")):
        (tmp_path / "odd" / "config.json").write_text(content)
        assert main(["import", str(tmp_path / "odd")]) == exit_code.USAGE
        assert said in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nowhere")]) == exit_code.USAGE
    assert main(["export-model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == exit_code.USAGE


def test_weights_go_through_a_process_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = directory(tmp_path / "tiny", TINY)
    assert main(["import", str(where), "--weights", str(tmp_path / "ours")]) == exit_code.USAGE
    assert "holds no *.safetensors" in capfd.readouterr().err
