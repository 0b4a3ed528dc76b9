"""`python -m moe.generate` on a run that was trained here: its JSON, its exit codes, and how tokens become text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import generate
from moe.model import build_model
from moe.train import checkpoint
from moe.train.vocabulary import BYTES
from spec.experiment import ExperimentSpec
from tests.moe.train.tiny import Run, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "run"
    spec = tiny()
    Run(spec, out).go()
    (out / "spec.json").write_text(spec.model_dump_json())
    return out


Generate = Callable[..., dict[str, Any]]


@pytest.fixture
def answer(trained: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    def run(*arguments: str) -> dict[str, Any]:
        assert generate.main([str(trained), *arguments]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_the_answer_is_what_the_checkpoint_says(trained: Path, answer: Generate) -> None:
    said = answer("--prompt", "héllo", "--tokens", "6", "--temperature", "0", "--step", "8")
    spec = ExperimentSpec.model_validate_json((trained / "spec.json").read_text())
    model = build_model(spec.model).eval()
    model.load_state_dict(checkpoint.load(trained / "checkpoints", 8)[0]["model"])
    ids = list("héllo".encode())
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits_BSV[0, -1, :257].argmax()))
        output = model(torch.tensor([ids]))
    assert (said["step"], said["prompt_tokens"], said["ids"], said["stopped"]) == (8, 6, ids, "length")
    assert said["moe_layers"] == [0, 1] and said["n_experts"] == 4 and not said["batch_dependent"] and said["notes"] == []
    for place in range(len(ids)):
        assert said["experts"][place] == [choice.expert_TK[place].tolist() for choice in output.choices]
        assert said["gates"][place] == [pytest.approx(choice.gate_TK[place].tolist(), abs=1e-3) for choice in output.choices]
    assert said["usage"] == output.stats.expert_tokens_LE.tolist()
    assert math.isclose(said["log_probs"][3], float(output.logits_BSV[0, 2].log_softmax(-1)[ids[3]]), abs_tol=1e-2)
    assert said["texts"][:6] == ["h", "", "é", "l", "l", "o"]


def test_without_a_step_the_newest_writes_and_without_a_prompt_a_document_begins(answer: Generate) -> None:
    said = answer("--tokens", "40", "--seed", "3")
    assert said["step"] == 12 and said["ids"][0] == 256 and said["prompt_tokens"] == 1
    assert said["notes"] and "32 tokens" in said["notes"][0]
    assert max(answer("--tokens", "200", "--temperature", "100")["ids"]) <= 256, "ids that the tokenizer does not have are never drawn"
    assert said == {**answer("--tokens", "40", "--seed", "3"), "seconds": said["seconds"]}


def test_under_a_capacity_it_says_that_the_choices_depend_on_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capacity = {"kind": "factor", "eval_factor": 0.5}
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 32, "capacity": capacity}
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}
    spec = tiny(model={"n_layers": 1, "d_model": 32, "attention": attention, "moe": moe}, training={"steps": 1, "batch_size": 4, "eval_batches": 1})
    Run(spec, tmp_path).go()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    capsys.readouterr()  # what training has said
    assert generate.main([str(tmp_path), "--prompt", "abcd", "--tokens", "6"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["batch_dependent"] and "capacity" in said["notes"][0]
    assert max(said["usage"][0]) <= 3, "at most ceil(0.5 * 2 * 10 / 4) tokens for each expert"


def test_what_is_not_there_and_what_is_wrong_have_exit_codes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(trained), "--step", "5"]) == 66
    assert generate.main([str(tmp_path), "--spec", str(trained / "spec.json")]) == 66
    assert generate.main([str(tmp_path)]) == 64
    assert "spec.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([str(trained), "--top-p", "0"])
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    (broken / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"x")
    assert generate.main([str(broken)]) == 66
    wider = tiny(model={"n_layers": 2, "d_model": 48, "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}})
    (broken / "spec.json").write_text(wider.model_dump_json())
    assert generate.main([str(broken), "--step", "8"]) == 64
    assert "another model" in capsys.readouterr().err


def test_the_prompt_may_come_from_a_file_and_the_answer_go_to_one(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("--tokens 9\n")
    out = tmp_path / "out.json"
    assert generate.main([str(trained), "--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "1", "--out", str(out)]) == 0
    said = json.loads(out.read_text())
    assert bytes(said["ids"][:-1]).decode() == "--tokens 9\n" and len(said["ids"]) == 12


def test_tokens_of_one_character_show_it_at_the_last_and_nothing_unprintable_is_said() -> None:
    shown = list(generate.texts(BYTES, [*"é".encode(), 256, 0xC3, 256, 0, 10, 0x7F, 0xE2, 0x82]))
    assert shown == ["", "é", "", "\ufffd", "", "␀", "\n", "␡", "", "\ufffd"]
