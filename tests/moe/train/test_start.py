"""Starts from weights that exist, and frozen parts, through the real trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe.layer import MoeLayer
from moe.train import checkpoint
from moe.train.stop import SpecRefused, Stopped
from spec import events
from tests.moe.train.tiny import HOME, Run

Start = Callable[..., Run]
DENSE: dict[str, Any] = {"moe": None}
MOE: dict[str, Any] = {"n_experts": 4, "top_k": 2, "d_expert": 64, "router": {"kind": "topk_softmax"}}
SHORT = {"steps": 2, "batch_size": 4, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 0}
NUMBER = 900_001  # of runs that this module leaves in HOME


@pytest.fixture
def place() -> Iterator[Path]:
    """The directory of run NUMBER of this host."""
    directory = HOME / "runs" / str(NUMBER)
    shutil.rmtree(directory, ignore_errors=True)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.learner.model.state_dict().items()}


def trained(run: Start, out: Path, **changes: Any) -> dict[str, Tensor]:
    """The weights of a run that has ended in `out`."""
    made = run(out=out, **changes)
    made.go()
    return weights(made)


def begun(made: Run) -> dict[str, Tensor]:
    """The weights that a run starts with."""
    made.training.resume()
    made.training.begin(HOME)
    return weights(made)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ----- a checkpoint


@pytest.mark.parametrize("how", ["run", "run brought here", "run's directory", "checkpoints", "one checkpoint"])
def test_fine_tuning_begins_with_a_runs_weights_and_a_fresh_optimiser(
    run: Start, place: Path, tmp_path: Path, how: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place if how == "run" else tmp_path / "source"
    source = trained(run, out, training=SHORT)
    if how == "run brought here":
        monkeypatch.setenv("MOELAB_ORIGIN", str(out / "checkpoints"))
    parts: dict[str, dict[str, Any]] = {
        "run": {"run": NUMBER},
        "run brought here": {"run": NUMBER},
        "run's directory": {"path": str(out)},
        "checkpoints": {"path": str(out / "checkpoints")},
    }
    start = parts.get(how, {"path": str(out / "checkpoints" / "step-00000002")})
    fine = run(out=tmp_path / "fine", training=SHORT, start={"kind": "checkpoint", **start})
    assert not same(weights(fine), source)
    assert same(begun(fine), source)
    assert all(not tensor.any() for tensor in fine.learner.optimizer.tensors().values())
    assert "start: the weights of" in capsys.readouterr().out
    assert fine.go().step == 2
    assert not same(weights(fine), source)


def test_the_step_chooses_and_a_damaged_checkpoint_is_passed_over_but_left_where_it_is(run: Start, tmp_path: Path) -> None:
    out = tmp_path / "source"
    trained(run, out, training={**SHORT, "steps": 3, "checkpoint_every": 1})
    states = {step: load_file(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (1, 2, 3)}
    assert same(begun(run(out=tmp_path / "a", start={"kind": "checkpoint", "path": str(out), "step": 1})), states[1])
    assert same(begun(run(out=tmp_path / "b", start={"kind": "checkpoint", "path": str(out)})), states[3])
    newest = out / "checkpoints" / "step-00000003"
    (newest / "state.json").write_text("{}")
    assert same(begun(run(out=tmp_path / "c", start={"kind": "checkpoint", "path": str(out)})), states[2])
    assert newest.is_dir()
    for step, says in ((3, "state.json"), (7, "has steps 1, 2, 3, not 7")):
        with pytest.raises(SpecRefused, match=says):
            begun(run(out=tmp_path / "d", start={"kind": "checkpoint", "path": str(out), "step": step}))


def test_a_resumed_run_loads_its_own_checkpoint_and_never_the_start_again(run: Start, tmp_path: Path) -> None:
    source = tmp_path / "source"
    trained(run, source, training=SHORT)
    changes = {"start": {"kind": "checkpoint", "path": str(source)}, "training": {**SHORT, "steps": 4}}
    whole = run(out=tmp_path / "whole", **changes)
    whole.go()
    halved = run(out=tmp_path / "halved", **changes)

    def stop_after_two(step: int) -> None:
        halved.requests.stop = step == 2

    with pytest.raises(Stopped):
        halved.go(stop_after_two)
    shutil.rmtree(source)  # what it began with may be gone by then
    again = run(out=tmp_path / "halved", attempt=1, **changes)
    again.go()
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"n_layers": 3}}, "model.n_layers: 3, but .* has model.n_layers 2"),
        ({"model": {"moe": {"n_experts": 8, "top_k": 2, "d_expert": 32}}}, "n_experts: 8, but .* has model.moe.n_experts 4"),
        ({"model": DENSE}, "model.moe: null, but"),
        ({"data": {"tokenizer": "bpe", "bpe_vocab_size": 300}, "model": {"vocab_size": 300}}, "data.tokenizer: bpe, but .* data.tokenizer byte"),
    ],
)
def test_another_model_is_refused_with_both_fields(run: Start, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    source = tmp_path / "source"
    trained(run, source, training=SHORT)
    with pytest.raises(SpecRefused, match=says):
        begun(run(out=tmp_path / "fine", start={"kind": "checkpoint", "path": str(source)}, **changes))


def test_weights_without_a_spec_are_compared_by_name_and_shape(run: Start, tmp_path: Path) -> None:
    source = tmp_path / "imported"
    source.mkdir()
    whole = weights(run())
    start = {"kind": "checkpoint", "path": str(source)}
    save_file({name: torch.ones_like(tensor) for name, tensor in whole.items()}, source / "model.safetensors")
    assert all(tensor.eq(1).all() for tensor in begun(run(out=tmp_path / "a", start=start)).values())
    for says, state in {
        "it has no norm.weight": {name: tensor for name, tensor in whole.items() if name != "norm.weight"},
        "no place for its extra": {**whole, "extra": torch.ones(1)},
        r"norm.weight is \[33\], but model needs \[32\]": {**whole, "norm.weight": torch.ones(33)},
    }.items():
        save_file(state, source / "model.safetensors")
        with pytest.raises(SpecRefused, match=says):
            begun(run(out=tmp_path / "b", start=start))


def test_paths_obey_the_host_and_runs_are_named_by_number(run: Start, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(run, place, training=SHORT)
    trained(run, tmp_path / "source", training=SHORT)

    def refused(says: str, **start: Any) -> None:
        with pytest.raises(SpecRefused, match=says):
            begun(run(out=tmp_path / "fine", start={"kind": "checkpoint", **start}))

    refused("run 900002 has no checkpoint on this machine", run=NUMBER + 1)
    refused("not a directory", path=str(tmp_path / "nowhere"))
    refused("give the run's number", path=str(place))
    (tmp_path / "link").symlink_to(place)
    refused("give the run's number", path=str(tmp_path / "link"))
    monkeypatch.setenv("MOELAB_DATA_ROOTS", str(tmp_path / "elsewhere"))
    refused("MOELAB_DATA_ROOTS", path=str(tmp_path / "source"))
    refused("MOELAB_DATA_ROOTS", path=str(tmp_path / "link"))
    assert same(
        begun(run(out=tmp_path / "fine", start={"kind": "checkpoint", "run": NUMBER})), load_file(next(place.glob("checkpoints/*/model.safetensors")))
    )


def test_balancing_and_capacity_may_change_when_a_model_is_fine_tuned(run: Start, tmp_path: Path) -> None:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 32}
    source = trained(run, tmp_path / "source", training=SHORT, model={"moe": {**moe, "balance": [{"kind": "loss_free_bias"}]}})
    other = {**moe, "top_k": 1, "balance": [{"kind": "z_loss"}], "capacity": {"kind": "factor"}}
    fine = run(out=tmp_path / "fine", training=SHORT, model={"moe": other}, start={"kind": "checkpoint", "path": str(tmp_path / "source")})
    assert same(begun(fine), {name: tensor for name, tensor in source.items() if not name.endswith("bias_E")})
    assert fine.go().step == 2


# ----- upcycling


def test_a_dense_run_is_upcycled_and_starts_at_its_loss(run: Start, place: Path, tmp_path: Path) -> None:
    dense = run(out=place, model=DENSE, training={**SHORT, "steps": 12})
    dense.go()
    first = {"steps": 1, "batch_size": 4, "eval_every": 0, "eval_batches": 2, "checkpoint_every": 0}
    start = {"kind": "upcycle", "run": NUMBER}
    moe = run(out=tmp_path / "moe", model={"moe": {**MOE, "balance": []}}, training=first, start=start)
    fine = run(out=tmp_path / "fine", model=DENSE, training=first, start={"kind": "checkpoint", "run": NUMBER})
    moe.go(), fine.go()
    assert float(moe.steps()[1].scalars[0]) == pytest.approx(float(fine.steps()[1].scalars[0]), abs=1e-4)
    assert float(fine.steps()[1].scalars[0]) < 5.2


def test_upcycling_refuses_what_does_not_fit(run: Start, place: Path, tmp_path: Path) -> None:
    trained(run, place, model=DENSE, training=SHORT)
    start = {"kind": "upcycle", "run": NUMBER}
    narrow = {**MOE, "d_expert": 48}
    with pytest.raises(SpecRefused, match=r"model.moe.d_expert: start.granularity 1 x 48 = 48, but run 900001 at step 2 has model.d_ff 64"):
        begun(run(out=tmp_path / "a", model={"moe": narrow}, start=start))
    shutil.rmtree(place)
    trained(run, place, training=SHORT)
    with pytest.raises(SpecRefused, match="start.run: run 900001 at step 2 has MoE layers"):
        begun(run(out=tmp_path / "b", model={"moe": MOE}, start=start))


# ----- Hugging Face's


@pytest.mark.parametrize("kind", ["huggingface", "upcycle"])
def test_a_hugging_face_directory(run: Start, tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, rope_theta=10_000.0, rms_norm_eps=1e-5, sliding_window=None, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    start = {"kind": kind, "path" if kind == "huggingface" else "huggingface": str(tmp_path / "theirs")}
    made = run(out=tmp_path / "run", model=DENSE if kind == "huggingface" else {"moe": MOE}, training=SHORT, start=start)
    begun(made)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = made.learner.model.eval()(tokens).logits_BSV
        assert (ours - theirs(tokens).logits).abs().max() < 1e-5
    made.learner.model.train()
    assert made.go().step == 2
    wrong = run(out=tmp_path / "wrong", model={**(DENSE if kind == "huggingface" else {"moe": MOE}), "n_layers": 3}, start=start)
    with pytest.raises(SpecRefused, match="n_layers"):
        begun(wrong)
    elsewhere = run(
        out=tmp_path / "nowhere", model={"moe": None if kind == "huggingface" else MOE}, start={**start, next(reversed(start)): str(tmp_path)}
    )
    with pytest.raises(SpecRefused, match="config.json"):
        begun(elsewhere)


# ----- frozen parts


@pytest.mark.parametrize("train", ["all", "all_but_moe", "only_moe", "only_router"])
def test_what_is_frozen_does_not_change_by_a_bit_while_the_rest_does(run: Start, train: str) -> None:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 32, "n_shared": 1, "balance": [{"kind": "switch_aux"}, {"kind": "loss_free_bias"}]}
    made = run(model={"moe": moe}, training={**SHORT, "train": train})
    model = made.learner.model
    inside = [name for name, module in model.named_modules() if isinstance(module, MoeLayer)]
    before = weights(made)
    made.go()
    changed = {name for name, tensor in weights(made).items() if not torch.equal(tensor, before[name])}
    moe_names = {name for name in before if any(name.startswith(f"{prefix}.") for prefix in inside)}
    router = {name for name in moe_names if ".router." in name}
    assert changed == {"all": before.keys(), "all_but_moe": before.keys() - moe_names, "only_moe": moe_names, "only_router": router}[train]
    biases = {name for name in before if name.endswith("bias_E")}
    stored = load_file(made.out / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    assert {name.removeprefix("mean/") for name in stored if name.startswith("mean/")} == changed - biases
    assert load_file(made.out / "checkpoints" / "step-00000002" / "model.safetensors").keys() == before.keys()


def test_the_gradient_norm_is_of_what_is_trained(run: Start) -> None:
    made = run(training={**SHORT, "train": "only_router"}, optimizer={"grad_clip": 0})
    made.learner.learn = _keeping_gradients(made)  # type: ignore[method-assign]
    made.go()
    assert made.norms == pytest.approx([float(event.scalars[_column(made, "grad_norm")]) for event in made.steps().values()], rel=1e-5)  # type: ignore[attr-defined]


def _column(made: Run, name: str) -> int:
    """Where a metric stands among a step's scalars."""
    return next(list(event.names).index(name) for event in made.events if isinstance(event, events.MetricsDeclared))


def _keeping_gradients(made: Run) -> Any:
    """`learn`, which also keeps the norm of the routers' gradients as autograd left them."""
    made.norms = []  # type: ignore[attr-defined]
    learner, learn = made.learner, made.learner.learn

    def kept(step: int, rate: float) -> Any:
        clip = learner.optimizer.clip

        def look(largest: float) -> Tensor:
            gradients = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
            assert all(".router." in name for name in gradients) and len(gradients) == 2
            made.norms.append(sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5)  # type: ignore[attr-defined]
            return clip(largest)

        learner.optimizer.clip = look  # type: ignore[method-assign]
        try:
            return learn(step, rate)
        finally:
            learner.optimizer.clip = clip  # type: ignore[method-assign]

    return kept


def test_a_frozen_run_that_is_interrupted_goes_on_as_it_would_have(run: Start, tmp_path: Path) -> None:
    training = {**SHORT, "steps": 4, "train": "only_moe"}
    whole, halved = run(out=tmp_path / "whole", training=training), run(out=tmp_path / "halved", training=training)
    whole.go()

    def stop_after_two(step: int) -> None:
        halved.requests.stop = step == 2

    with pytest.raises(Stopped):
        halved.go(stop_after_two)
    again = run(out=tmp_path / "halved", attempt=1, training=training)
    again.go()
    assert same(weights(again), weights(whole))
    assert checkpoint.steps(tmp_path / "halved" / "checkpoints") == [2, 4]


def test_a_checkpoint_knows_its_spec(run: Start) -> None:
    made = run(training=SHORT)
    made.go()
    state = json.loads((made.out / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["spec"] == made.training.spec.model_dump(mode="json")
