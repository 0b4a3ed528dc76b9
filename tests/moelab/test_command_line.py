"""The command line without a server: help that teaches, exit codes, and what needs none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelab.cli import MODULES, build_parser, exit_code, main
from moelab.cli.describe import overrides
from moelab.cli.table import age, count, duration, table


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server, no token."""
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    monkeypatch.setenv("MOELAB_SERVER", "http://127.0.0.1:9")
    monkeypatch.delenv("MOELAB_TOKEN", raising=False)


def commands() -> list[str]:
    actions = build_parser()._subparsers
    assert actions is not None
    return list(actions._group_actions[0].choices or ())


@pytest.mark.parametrize("command", commands())
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: moelab {command}" in capsys.readouterr().out


def test_the_help_shows_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command}" in text for command in commands())
    assert "exit codes: 0" in text
    assert len(MODULES) <= len(commands())


def test_wrong_use_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["wait"])
    assert left.value.code == exit_code.USAGE
    assert main(["submit", "nano-mixtral", "--set", "top_k"]) == exit_code.USAGE
    assert "PATH=VALUE" in capsys.readouterr().err
    assert main(["submit", "no-such-file.yaml"]) == exit_code.USAGE
    assert main(["price", "nano-mixtra"]) == exit_code.USAGE
    assert "did you mean 'nano-mixtral'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["ps"], ["show", "1"], ["submit", "nano-mixtral"], ["logs", "-f", "1"], ["cancel", "1"], ["wait", "1", "--timeout", "1"]]
)
def test_a_server_out_of_reach_is_3(command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelab.patience.PATIENCE_S", 0.5)
    assert main(command) == exit_code.UNREACHABLE
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err


def test_several_states_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("moelab.client.Client.runs", lambda self, **filters: asked.update(filters) or [])
    assert main(["ps", "--state", "queued, running"]) == 0
    assert asked["state"] == ["queued", "running"]


def test_the_exit_code_of_a_state() -> None:
    assert [exit_code.for_state(state) for state in ("succeeded", "failed", "cancelled", "running")] == [0, 1, 130, 0]


def test_the_price_of_a_preset_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["price", "mixtral-8x7b", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["total_params"] == 46_702_792_704
    assert cost["active_params"] == {
        "with_embeddings": 12_879_925_248, "without_input_embedding": 12_748_853_248, "without_embeddings": 12_617_781_248
    }  # fmt: skip
    assert set(cost["flops_per_token"]) == {"forward", "training"}
    assert cost["bytes"]["weights"] == 4 * cost["total_params"]


def test_the_price_of_a_file_with_changes_and_of_a_wrong_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    main(["presets", "nano-mixtral"])
    path.write_text(capsys.readouterr().out)
    assert main(["price", str(path), "--set", "model.moe.n_experts=16", "--json"]) == 0
    larger = json.loads(capsys.readouterr().out)["total_params"]
    assert main(["price", str(path), "--json"]) == 0
    assert larger > json.loads(capsys.readouterr().out)["total_params"]
    assert main(["price", str(path), "--set", "model.moe.top_k=99"]) == exit_code.USAGE
    assert "/model/moe/top_k: top_k 99 > n_experts 8" in capsys.readouterr().err
    path.write_text("model: {n_layers: 2, n_layers: 3}")
    assert main(["price", str(path)]) == exit_code.USAGE
    assert "appears twice" in capsys.readouterr().err


def test_the_dense_baseline_of_a_preset_is_a_spec_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", "nano-mixtral", "--set", "model.moe.top_k=1"]) == 0
    told = capsys.readouterr()
    path = tmp_path / "dense.yaml"
    path.write_text(told.out)
    assert "nano-mixtral, dense: " in told.err and "forward FLOPs per token" in told.err
    assert main(["price", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["by_part"]["experts"] == 0
    assert main(["baseline", str(path)]) == exit_code.USAGE
    assert "/model/moe: moe: null, the spec is dense already" in capsys.readouterr().err
    assert main(["baseline", "mixtral-8x7b", "--equal", "params", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["d_ff"] == 28_675


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PRESET", "SIZE", "TOTAL", "ACTIVE", "WHAT"]
    assert any(line.startswith("deepseek-v3 ") and "671B" in line for line in lines)


def test_spool_sync_with_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spool", "sync"]) == 0
    assert capsys.readouterr().out == "nothing to ship\n"


def test_values_of_set_are_yaml() -> None:
    given = overrides(["a.b=4", "c=1e-3", "d=true", "e=hello=x", "f=[1, 2]", "g=", "h=null"])
    assert given == {"a.b": 4, "c": 0.001, "d": True, "e": "hello=x", "f": [1, 2], "g": None, "h": None}


def test_tables_and_durations() -> None:
    assert table(("A", "N"), [("x\x1b[31m\ny", 5), (None, 12345.678)], right=("N",)).splitlines()[1:] == ["x [31m y       5", "-         12,346"]
    assert [duration(s) for s in (None, 5, 119, 120, 7200, 200_000)] == ["-", "5s", "119s", "2m", "2h", "2d"]
    assert [count(n) for n in (0, 999, 46_702_792_704, 671 * 10**9)] == ["-", "999", "46.7B", "671B"]
    assert age(None) == "-"
