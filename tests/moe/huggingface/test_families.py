"""transformers' published models as oracle of every family: logits, choices, gates and gradients; there and back again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.huggingface import Report, load
from moe.huggingface.export import export
from moe.huggingface.load import joined
from moe.huggingface.source import Source, read_config
from moe.model import Transformer, build_model
from spec.huggingface import ConfigError, config_of, model_of
from spec.huggingface.evaluated import differences
from spec.model import Model
from tests.moe.huggingface.published import FAMILIES, published, transformers

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@dataclass
class Imported:
    """A family's model, what it saved, and ours with the same weights."""

    theirs: nn.Module
    ours: Transformer
    directory: Path
    report: Report
    tokens: Tensor


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Imported]:
    made: dict[str, Imported] = {}

    def make(name: str) -> Imported:
        if name not in made:
            directory = tmp_path_factory.mktemp("published")
            theirs = published(name)
            theirs.save_pretrained(directory)
            ours = build_model(model_of(read_config(directory))).eval()
            report = load(directory, ours)
            made[name] = Imported(theirs, ours, directory, report, torch.randint(0, 264, (2, 40)))
        return made[name]

    return make


def explicit(model: Model) -> Model:
    """With the width of a head written out, which an export always does."""
    return (
        model
        if model.attention.kind != "gqa"
        else model.model_copy(update={"attention": model.attention.model_copy(update={"head_dim": model.head_dim})})
    )


def their_choices(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """Filled on each forward pass with each MoE layer's (experts, gates): what the experts are called with, or the k best logits."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    kind, top_k = model.config.model_type, getattr(model.config, "num_experts_per_tok", 0)
    for name, module in model.named_modules():
        if kind == "llama4_text" and name.endswith("feed_forward.router"):
            module.register_forward_hook(lambda _, args, out: seen.append((out[1].topk(top_k).indices, out[1].topk(top_k).values.sigmoid())))
        elif kind == "jetmoe" and name.endswith("mlp.router"):
            module.register_forward_hook(lambda _, args, out: seen.append((out[4].topk(2).indices, out[4].topk(2).values.softmax(-1))))
        elif kind != "jetmoe" and name.endswith((".mlp.experts", ".ffn.experts")):
            module.register_forward_pre_hook(lambda _, args: seen.append((args[1].detach(), args[2].detach())))
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_weights_choose_the_same_experts_and_give_the_same_logits(name: str, imported: Callable[[str], Imported]) -> None:
    it = imported(name)
    chosen = their_choices(it.theirs)
    with torch.no_grad():
        wanted, output = it.theirs(input_ids=it.tokens, use_cache=False).logits, it.ours(it.tokens)
    assert output.logits_BSV is not None
    assert len(chosen) == len(output.choices) == len(it.ours.spec.moe_layers())
    for (their_expert, their_gate), ours in zip(chosen, output.choices, strict=True):
        their_order, our_order = their_expert.argsort(-1), ours.expert_TK.argsort(-1)
        assert torch.equal(their_expert.gather(-1, their_order), ours.expert_TK.gather(-1, our_order))
        torch.testing.assert_close(ours.gate_TK.gather(-1, our_order), their_gate.gather(-1, their_order).float(), rtol=1e-4, atol=1e-6)
    assert (output.logits_BSV - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_one_step_has_the_same_gradients(name: str, imported: Callable[[str], Imported], tmp_path: Path) -> None:
    it = imported(name)
    targets = torch.randint(0, 264, it.tokens.shape)
    theirs, ours = published(name), build_model(it.ours.spec).eval()
    ours.load_state_dict(it.ours.state_dict())
    F.cross_entropy(theirs(input_ids=it.tokens, use_cache=False).logits.flatten(0, 1), targets.flatten()).backward()
    loss = ours(it.tokens, targets).lm_loss
    assert loss is not None
    loss.backward()

    with torch.no_grad():  # Their gradients in the place of their weights go through the same table: it is linear.
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    wanted = dict(joined(Source(tmp_path), ours.spec, read_config(tmp_path), shapes, Report("")))
    for key, parameter in ours.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - wanted[key]).norm() <= 1e-4 * wanted[key].norm() + 1e-9, key


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_again(name: str, imported: Callable[[str], Imported], tmp_path: Path) -> None:
    it = imported(name)
    report = export(it.ours.state_dict(), it.ours.spec, tmp_path, max_shard_bytes=40_000, max_len=64)
    assert report.family == it.theirs.config.model_type
    if len(list(tmp_path.glob("*.safetensors"))) > 1:
        assert all(file.stat().st_size < 60_000 for file in tmp_path.glob("*.safetensors"))
        assert (tmp_path / "model.safetensors.index.json").is_file()
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        wanted, got = (model(input_ids=it.tokens, use_cache=False).logits for model in (it.theirs, back.eval()))
    assert torch.equal(got, wanted)

    again = build_model(model_of(read_config(tmp_path)))
    assert explicit(model_of(read_config(tmp_path))) == explicit(it.ours.spec)
    load(tmp_path, again)
    mine = it.ours.state_dict()
    assert all(torch.equal(tensor, mine[key]) for key, tensor in again.state_dict().items())
    # What we write has the names that the family's checkpoints have on the disk.
    assert {line.theirs for line in report.lines} == {line.theirs for line in it.report.lines if line.ours}


def without(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy that lacks the field at `path`."""
    key, *rest = path
    if not rest:
        return {name: value for name, value in config.items() if name != key}
    return {**config, key: without(config[key], tuple(rest))}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_field_means_what_it_means_to_transformers(name: str, imported: Callable[[str], Imported]) -> None:
    it = imported(name)
    config = read_config(it.directory)
    parts = [(key, inner) for key in ("attn_config", "ffn_config") for inner in config.get(key, {})]
    compared = 0
    for path in [*((key,) for key in config if key not in ("model_type", "transformers_version")), *parts]:
        lacking = without(config, path)
        try:
            theirs = type(it.theirs.config).from_dict(copy.deepcopy(lacking)).to_dict()
            wanted = model_of(json.loads(json.dumps(theirs)))
        except Exception:  # Beside such small sizes some of their defaults are nonsense, and huggingface_hub has errors of its own for it.
            continue
        try:
            got = model_of(lacking)
        except ConfigError as error:
            assert [problem.detail for problem in error.problems] == [f"{path[-1]}: is missing"]
            continue
        if (name, path) == ("dbrx", ("rope_parameters",)):  # Published with theta in attn_config, where transformers 5 does not look for it.
            assert got.rope_theta == config["attn_config"]["rope_theta"]
            continue
        assert differences(got, wanted) == [], path
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_accounted_for(name: str, imported: Callable[[str], Imported]) -> None:
    it = imported(name)
    lines = {line.theirs: line for line in it.report.lines}
    assert set(lines) == set(Source(it.directory).names)
    assert {line.ours for line in lines.values() if line.ours} == set(it.ours.state_dict())
    assert all(line.note for line in lines.values() if not line.ours)
    config = json.loads((it.directory / "config.json").read_text())
    assert explicit(model_of(config_of(it.ours.spec, max_len=64))) == explicit(model_of(config))
