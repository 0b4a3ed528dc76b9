"""Files on the disk: every way in which a checkpoint can be wrong is an error that names the tensor; layouts, shards, dtypes, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.huggingface import Report, WeightsError, load
from moe.huggingface.__main__ import main
from moe.huggingface.export import export
from moe.model import Transformer, build_model
from spec.experiment import ExperimentSpec
from spec.huggingface import ConfigError, config_of, model_of
from spec.model import Model
from tests.moe.train.tiny import Run, tiny

QK = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "head"}
GATE = "model.layers.0.mlp.gate.weight"


def small(**changes: Any) -> Model:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 16, "router": {"kind": "softmax_topk"}}
    return Model.model_validate({"n_layers": 2, "d_model": 32, "vocab_size": 264, "tie_embeddings": False, "attention": QK, "moe": moe, **changes})


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A Qwen3-MoE directory with random weights."""
    torch.manual_seed(1)
    model = build_model(small())
    export(model.state_dict(), model.spec, tmp_path / "hf")
    return tmp_path / "hf"


def change(directory: Path, changes: dict[str, Tensor | None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({name: tensor for name, tensor in tensors.items() if name not in changes or changes[name] is not None}, file)


def configure(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def filled(directory: Path) -> tuple[Transformer, Report]:
    model = build_model(model_of(json.loads((directory / "config.json").read_text())))
    return model, load(directory, model)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({GATE: None}, f"{GATE} is missing, of which blocks.0.ffn.router.weight is made"),
        ({"model.layers.1.mlp.experts.3.up_proj.weight": None}, "model.layers.1.mlp.experts.3.up_proj.weight is missing"),
        ({"model.layers.0.self_attn.q_norm.weight": None}, "q_norm.weight is missing"),
        ({"model.layers.0.mlp.mystery": torch.zeros(2)}, "model.layers.0.mlp.mystery would be dropped"),
        ({"model.layers.2.mlp.gate.weight": torch.zeros(2)}, "model.layers.2.mlp.gate.weight would be dropped"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias would be dropped"),
        ({GATE: torch.zeros(5, 32)}, r"gate.weight is \[5, 32\], but blocks.0.ffn.router.weight needs \[4, 32\]"),
        ({GATE: torch.zeros(4, 32).to(torch.float8_e4m3fn)}, "gate.weight is F8_E4M3: quantised weights are not read"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_told_with_its_name(written: Path, changes: dict[str, Tensor | None], told: str) -> None:
    change(written, changes)
    with pytest.raises(WeightsError, match=told):
        filled(written)


def test_a_spec_that_computes_something_else_is_refused(written: Path) -> None:
    for changed, told in (
        ({"rope_theta": 5000.0}, "rope_theta"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"attention": {**QK, "qk_norm": "none"}}, "qk_norm"),
    ):
        with pytest.raises(WeightsError, match=rf"model\.[\w.]*{told} is .* but config.json says"):
            load(written, build_model(small(**changed)))


def test_one_tensor_for_all_experts_is_read_as_well(written: Path) -> None:
    model, _ = filled(written)
    tensors = load_file(written / "model.safetensors")
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        one = [[tensors.pop(f"{at}{expert}.{name}_proj.weight") for name in ("gate", "up", "down")] for expert in range(4)]
        tensors[f"{at}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in one])
        tensors[f"{at}down_proj"] = torch.stack([down for *_, down in one])
    save_file(tensors, written / "model.safetensors")
    again, report = filled(written)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert "model.layers.1.mlp.experts.gate_up_proj" in {line.theirs for line in report.lines}


def test_a_tied_embedding_may_lie_there_twice_if_it_is_the_same(tmp_path: Path) -> None:
    model = build_model(small(tie_embeddings=True))
    export(model.state_dict(), model.spec, tmp_path / "hf")
    embedding = model.embedding.weight.detach().clone()
    change(tmp_path / "hf", {"lm_head.weight": embedding})
    assert [line.note for line in filled(tmp_path / "hf")[1].left_out] == ["tied to model.embed_tokens.weight, and equal to it"]
    change(tmp_path / "hf", {"lm_head.weight": embedding + 1})
    with pytest.raises(WeightsError, match="lm_head.weight is not model.embed_tokens.weight, although config.json ties them"):
        filled(tmp_path / "hf")


def test_buffers_of_old_checkpoints_and_extra_predictions_are_left_out_by_name(tmp_path: Path) -> None:
    attention = {"kind": "mla", "n_heads": 4, "norm_eps": 1e-6}
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 16, "n_shared": 1, "router": {"kind": "sigmoid_topk"}, "balance": [{"kind": "loss_free_bias"}]}
    model = build_model(small(attention=attention, moe=moe, mtp_depth=1))
    report = export(model.state_dict(), model.spec, tmp_path / "hf")
    assert report.family == "deepseek_v3"
    assert sum("mtp.0." in note for note in report.notes) == sum(name.startswith("mtp.") for name in model.state_dict())
    change(tmp_path / "hf", {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    left = {line.theirs: line.note for line in filled(tmp_path / "hf")[1].left_out}
    assert left["model.layers.0.self_attn.rotary_emb.inv_freq"] == "follows from the configuration"
    assert left["model.layers.2.eh_proj.weight"].startswith("multi-token prediction")
    change(tmp_path / "hf", {"model.layers.99.eh_proj.weight": torch.zeros(32, 64)})
    with pytest.raises(WeightsError, match=r"model\.layers\.99\.eh_proj\.weight would be dropped"):
        filled(tmp_path / "hf")


def test_a_selection_bias_has_a_place_or_must_be_zero(tmp_path: Path) -> None:
    attention = {"kind": "mla", "n_heads": 4, "norm_eps": 1e-6}
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 16, "n_shared": 1, "router": {"kind": "sigmoid_topk"}, "balance": []}
    model = build_model(small(attention=attention, moe=moe))
    export(model.state_dict(), model.spec, tmp_path / "hf")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")[bias], torch.zeros(4))
    assert filled(tmp_path / "hf")[0].expert_bias() is not None  # the family always has it
    load(tmp_path / "hf", model)
    change(tmp_path / "hf", {bias: torch.ones(4)})
    with pytest.raises(WeightsError, match="e_score_correction_bias is not zero, and the spec has nothing to hold it"):
        load(tmp_path / "hf", model)


def test_a_text_model_beside_a_vision_tower(tmp_path: Path) -> None:
    moe = {"n_experts": 4, "top_k": 1, "d_expert": 16, "n_shared": 1, "router": {"kind": "sigmoid_input"}}
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "l2"}
    model = build_model(small(attention=attention, moe=moe))
    export(model.state_dict(), model.spec, tmp_path / "hf")
    plain = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(
        {f"language_model.{name}": tensor for name, tensor in plain.items()} | {"vision_model.x": torch.zeros(3)},
        tmp_path / "hf" / "model.safetensors",
    )
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": config, "vision_config": {}}))
    again, report = filled(tmp_path / "hf")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [(line.theirs, line.note) for line in report.left_out] == [("vision_model.x", "the vision tower")]


def test_experts_in_mxfp4_are_unpacked(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    moe = {"n_experts": 3, "top_k": 2, "d_expert": 64, "bias": "expert", "router": {"kind": "topk_softmax", "bias": True}}
    attention = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "bias": True, "output_bias": True, "sinks": True, "sliding_window": 8}
    model = build_model(small(attention=attention, activation="swiglu_clamped", moe=moe))
    export(model.state_dict(), model.spec, tmp_path / "hf")
    packed: dict[str, Tensor] = {}
    for layer in range(2):
        for name, shape in (("gate_up_proj", (3, 128, 1)), ("down_proj", (3, 32, 2))):
            at = f"model.layers.{layer}.mlp.experts.{name}"
            packed |= {f"{at}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8), f"{at}_scales": torch.randint(117, 125, shape).byte()}
    dropped = {name.removesuffix("_blocks"): None for name in packed if name.endswith("_blocks")}
    change(tmp_path / "hf", packed | dropped)
    configure(tmp_path / "hf", quantization_config={"quant_method": "mxfp4"})
    state = filled(tmp_path / "hf")[0].state_dict()
    for layer in range(2):
        theirs = {
            name: mxfp4.convert_moe_packed_tensors(
                *(packed[f"model.layers.{layer}.mlp.experts.{name}_{part}"] for part in ("blocks", "scales")), dtype=torch.float32
            )
            for name in ("gate_up_proj", "down_proj")
        }
        ours = state[f"blocks.{layer}.ffn.experts.w_in"]
        assert torch.equal(ours[:, :64].mT, theirs["gate_up_proj"][..., ::2]) and torch.equal(ours[:, 64:].mT, theirs["gate_up_proj"][..., 1::2])
        assert torch.equal(state[f"blocks.{layer}.ffn.experts.w_out"].mT, theirs["down_proj"])
    change(tmp_path / "hf", {name: tensor[:, :-1].contiguous() for name, tensor in packed.items() if name.endswith("0.mlp.experts.down_proj_scales")})
    with pytest.raises(WeightsError, match=r"down_proj_scales is \[3, 31, 2\], but blocks.0.ffn.experts.w_out needs \[3, 32, 2\]"):
        filled(tmp_path / "hf")


@pytest.mark.parametrize(
    ("router", "top_k", "qk_norm", "family"),
    [
        ({"kind": "switch", "jitter": 0.1}, 1, "full", "olmoe"),
        ({"kind": "gshard"}, 2, "none", "mixtral"),
        ({"kind": "topk_softmax"}, 2, "head", "qwen3_moe"),
    ],
)
def test_routers_that_differ_in_training_alone_are_exported(router: dict[str, Any], top_k: int, qk_norm: str, family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    moe = {"n_experts": 4, "top_k": top_k, "d_expert": 16, "router": {**router, "init_std": 1.0}}
    model = build_model(small(moe=moe, attention={**QK, "qk_norm": qk_norm}, init_std=0.15)).eval()
    assert export(model.state_dict(), model.spec, tmp_path / "hf").family == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, 264, (2, 30))
    with torch.no_grad():
        wanted, got = model(tokens).logits_BSV, theirs(input_ids=tokens, use_cache=False).logits
    assert wanted is not None and (got - wanted).norm() < 1e-5 * wanted.norm()


def test_directories_that_are_no_checkpoints(written: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        load(tmp_path / "empty", build_model(small()))
    (written / "model.safetensors").rename(written / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled weights are not read"):
        filled(written)
    (written / "pytorch_model.bin").rename(written / "model.safetensors")
    (written / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(WeightsError, match="which is not a file beside it"):
        filled(written)
    (written / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(WeightsError, match=r"model-1\.safetensors is missing"):
        filled(written)
    (written / "model.safetensors.index.json").unlink()
    (written / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="cannot be read"):
        filled(written)
    configure(written, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="quantised .gptq."):
        filled(written)


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    model = build_model(small())
    export(model.state_dict(), model.spec, tmp_path / "hf", dtype="bfloat16", max_shard_bytes=4000)
    shards = sorted(tmp_path.glob("hf/*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and {shard.name for shard in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    assert all(tensor.dtype == torch.bfloat16 for shard in shards for tensor in load_file(shard).values())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    again, _ = filled(tmp_path / "hf")
    assert all(torch.equal(tensor.bfloat16().float(), again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_an_export_keeps_what_is_there_already(written: Path) -> None:
    model = build_model(small())
    with pytest.raises(WeightsError, match="is not a new or empty directory"):
        export(model.state_dict(), model.spec, written)
    with pytest.raises(ConfigError, match="capacity"):
        export(model.state_dict(), small(moe={"capacity": {"kind": "factor"}}), written / "new")
    assert not (written / "new").exists()


# ----- the command


def test_a_run_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tiny(training={"steps": 2, "batch_size": 4, "eval_every": 0, "checkpoint_every": 2})
    Run(spec, tmp_path / "run").go()
    capsys.readouterr()
    (tmp_path / "run" / "spec.json").write_text(json.dumps(spec.model_dump(mode="json")))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "hf"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "mixtral" and "tokenizer" in report["notes"][-1]

    assert main(["report", str(tmp_path / "hf")]) == 0
    assert "block_sparse_moe.gate.weight" in capsys.readouterr().out
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    assert main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ours")]) == 0
    [saved] = (tmp_path / "run" / "checkpoints").glob("step-*")
    mine, theirs = load_file(saved / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()) and set(mine) == set(theirs)
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    imported = ExperimentSpec.model_validate_json((tmp_path / "ours" / "spec.json").read_text())
    assert config_of(imported.model, max_len=32) == config_of(spec.model, max_len=32) and imported.name == "hf"

    for source in (saved, tmp_path / "ours"):
        out = tmp_path / f"again-{source.name}"
        assert main(["export", str(source), "--out", str(out), "--dtype", "bfloat16"]) == 0
        assert (
            load_file(out / "model.safetensors")["lm_head.weight" if not spec.model.tie_embeddings else "model.norm.weight"].dtype == torch.bfloat16
        )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["report", "nowhere"], "config.json cannot be read"),
        (["export", "nowhere", "--out", "x"], "holds no checkpoint"),
        (["export", "hf", "--out", "x"], "holds no spec.json: name the spec with --spec"),
        (["export", "hf", "--out", "x", "--spec", "nano-switch"], "moe.capacity.kind"),
        (["import", "hf", "--out", "hf"], "is not a new or empty directory"),
    ],
)
def test_refusals_are_one_line_each(
    arguments: list[str], told: str, written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(written.parent)
    assert main(arguments) == 64
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert [path.name for path in written.parent.iterdir()] == ["hf"]
