"""Shards in bfloat16: matrices are gathered as such and nothing is kept of them; what is float32 elsewhere stays float32; the accountant knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.train import corpus
from moe.train.batches import Batches
from moe.train.learner import Learner
from moe.train.ranks import Ranks
from moe.train.sharded import local
from spec.accounting import price
from spec.experiment import ExperimentSpec
from tests.moe.parallel.ranks import on_ranks
from tests.moe.train.tiny import HOME, tiny

RANKS, STEPS = 2, 3
TOLERANCE = 1e-4  # relative, of losses and norms: the order of sums, which now and then moves a product's rounding to bfloat16
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed, in two micro-batches": {"activation_recompute": True, "grad_accumulation": 2},
    "float32": {"precision": "float32"},
    "attention's own experts, with biases": {},
}


def spec(case: str, *, shard: bool) -> ExperimentSpec:
    moe = {"n_experts": 4, "top_k": 2, "d_expert": 20, "n_shared": 1, "router": {"kind": "sigmoid_topk"}, "balance": [{"kind": "loss_free_bias"}]}
    attention: dict[str, Any] = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "sinks": True, "qk_norm": "head"}
    if case.startswith("attention"):
        attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "bias": True, "experts": {"n_experts": 3, "top_k": 2}}  # 3 rows over 2 ranks
    return tiny(
        model={"moe": moe, "attention": attention},
        optimizer={"schedule": "constant", "warmup_steps": 0, "lr": 1e-3},
        training={"steps": 100, "batch_size": 12, "precision": "bfloat16", **CASES[case]},
        parallel={"data": RANKS, "shard": shard},
    )


def learner(described: ExperimentSpec) -> Learner:
    batches = Batches(corpus.load(described.data, HOME), described.data.seq_len, described.training.batch_size, described.seed)
    return Learner(described, batches, Ranks(dist.get_rank(), RANKS, torch.device("cpu"), shard=described.parallel.shard))


def sent_bytes(learning: Learner) -> int:
    """What gathering weights and reducing their gradients would send from this rank in a step, by rings: half of what is whole."""
    whole: list[Tensor] = []

    def gather(output: Tensor, *rest: Any, **options: Any) -> Any:
        whole.append(output)
        return gathered(output, *rest, **options)

    def reduce(**given: Any) -> Any:
        whole.append(given["input"])
        return reduced(**given)

    gathered, reduced = dist.all_gather_single, dist.reduce_scatter_single
    with patch.object(dist, "all_gather_single", gather), patch.object(dist, "reduce_scatter_single", reduce):
        learning.learn(STEPS + 1, 0.0)
    return sum(tensor.numel() * tensor.element_size() for tensor in whole) // RANKS


def held_bytes(learning: Learner) -> dict[str, int]:
    """What lies in memory of weights, gradients and moments at a step's end, and of the largest buffer that gradients are joined in."""
    found, joined = {}, [0]

    def reduce(flat: Tensor, **options: Any) -> Any:
        own = {parameter.grad.data_ptr() for parameter in learning.optimizer.parameters.values() if parameter.grad is not None}
        joined.append(0 if flat.data_ptr() in own else flat.nbytes)
        return reduced(flat, **options)

    def look(rate: float) -> None:
        found["gradients"] = stored(parameter.grad for parameter in learning.optimizer.parameters.values() if parameter.grad is not None)

    reduced = dist.all_reduce
    with patch.object(dist, "all_reduce", reduce), patch.object(learning.optimizer, "step", look):
        learning.learn(STEPS + 3, 0.0)
    found["weights"], found["reduction"] = stored(learning.model.parameters()), max(joined)
    found["optimizer"] = stored(tensor for name, tensor in learning.optimizer.tensors().items() if name != "steps")
    return found


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind them, padding and all."""
    storages = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def kept_bytes(learning: Learner) -> int:
    """Of matrices in bfloat16 that lie in memory when a forward pass has ended: what autograd holds of them, and the experts' copies."""
    matrices = {tuple(parameter.shape) for parameter in learning.model.parameters() if parameter.dim() > 1}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in matrices | {shape[::-1] for shape in matrices}:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens_BS, targets_BS = next(iter(learning._loader.micro_batches(1)))
    with learning.model.experts_cast(learning.dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with learning.autocast():
            output = learning.model(tokens_BS, targets_BS)
        assert output.lm_loss is not None
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        (output.lm_loss + output.balance_loss).backward()
    learning.optimizer.zero_grad()
    return size


def dtypes(learning: Learner) -> dict[str, str]:
    """By module, of the weights that a forward pass works with."""
    seen: dict[str, str] = {}

    def note(name: str) -> Any:
        return lambda module, *_: seen.update({f"{name}.{key}": str(weight.dtype) for key, weight in module.named_parameters(recurse=False)})

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in learning.model.blocks[0].named_modules() if name]
    learning.learn(STEPS + 2, 0.0)
    for hook in hooks:
        hook.remove()
    return seen


def every_case() -> dict[str, Any]:
    """Of one rank: each case with and without shards."""
    told: dict[str, Any] = {}
    for case in CASES:
        for shard in (False, True):
            learning = learner(spec(case, shard=shard))
            steps = [learning.train_step(step, lambda: (False, False)).figures for step in range(1, STEPS + 1)]
            told[f"{case}, {shard}"] = {
                "steps": [(figures.lm_loss, figures.grad_norm) for figures in steps],
                "dtypes": dtypes(learning),
                "whole": learning.tensors()["model"],
                "sent": sent_bytes(learning) if shard else 0,
                "held": held_bytes(learning),
                "kept": kept_bytes(learning),
                "masters": sorted({str(tensor.dtype) for tensor in (*learning.model.parameters(), *learning.optimizer.tensors().values())}),
            }
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first: dict[str, Any] = on_ranks(RANKS, tmp_path_factory.mktemp("ranks"), every_case)[0]
    return first


@pytest.mark.parametrize("case", CASES)
def test_shards_learn_what_whole_weights_learn(told: dict[str, Any], case: str) -> None:
    whole, cut = told[f"{case}, False"]["steps"], told[f"{case}, True"]["steps"]
    assert cut[0] == pytest.approx(whole[0], rel=1e-6), "before the first update all products are the very same"
    for one, other in zip(cut, whole, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_all_weights_whole(told: dict[str, Any], case: str) -> None:
    whole, cut = told[f"{case}, False"]["whole"], told[f"{case}, True"]["whole"]
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert type(cut[name]) is Tensor and cut[name].dtype == tensor.dtype
        assert (cut[name] - tensor).norm() <= 1e-3 * tensor.norm().clamp_min(1e-6), name


def test_routers_norms_sinks_and_master_weights_are_float32(told: dict[str, Any]) -> None:
    cut = told["plain, True"]
    assert cut["masters"] == ["torch.float32"]
    rounded = {name for name, dtype in cut["dtypes"].items() if dtype == "torch.bfloat16"}
    assert rounded == {"attention.qkv.weight", "attention.out.weight", "ffn.shared.w_in", "ffn.shared.w_out"}
    assert {"ffn.router.weight", "attention_norm.weight", "attention.sinks_H", "ffn.experts.w_in"} <= cut["dtypes"].keys() - rounded


@pytest.mark.parametrize("case", CASES)
def test_the_accountant_knows_what_is_sent(told: dict[str, Any], case: str) -> None:
    assert told[f"{case}, True"]["sent"] == price(spec(case, shard=True)).sharding_bytes_per_step


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_accountant_knows_what_is_held(told: dict[str, Any], case: str, shard: bool) -> None:
    size = price(spec(case, shard=shard)).bytes
    held = told[f"{case}, {shard}"]["held"]
    assert (held["weights"], held["optimizer"]) == (size.weights, size.optimizer)
    assert held["reduction"] == size.reduction
    if not (shard and "micro-batches" in case):  # until the last of these they are whole
        assert held["gradients"] == size.gradients


def test_the_accountant_knows_what_is_kept(told: dict[str, Any]) -> None:
    """Beside what is gathered: of shards the output projection's copy alone, and the experts'."""
    vocabulary, experts = 2 * spec("plain", shard=True).model.vocab_size * 32, 2 * 2 * 4 * 3 * 20 * 32
    whole = price(spec("plain", shard=False)).bytes.copies
    assert (told["plain, False"]["kept"], told["plain, True"]["kept"]) == (whole, vocabulary + experts)
    assert told["float32, False"]["kept"] == told["float32, True"]["kept"] == 0
