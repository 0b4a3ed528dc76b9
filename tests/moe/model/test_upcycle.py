"""Upcycling against the dense model that it began with: the same logits where the gates are normalised, and what noise and slices do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.layer import MoeLayer
from moe.model import Transformer, build_model
from moe.train.upcycle import upcycle
from spec.model import Model
from spec.start import Upcycle

SHAPE: dict[str, Any] = {"n_layers": 3, "d_model": 32, "d_ff": 48, "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}, "init_std": 0.2}
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def dense(**changes: Any) -> Transformer:
    torch.manual_seed(7)
    return build_model(Model.model_validate({**SHAPE, "moe": None, **changes})).eval()


def sparse(moe: dict[str, Any], **changes: Any) -> Transformer:
    torch.manual_seed(8)
    return build_model(Model.model_validate({**SHAPE, "moe": {"router": {"kind": "topk_softmax"}, **moe}, **changes})).eval()


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        found: Tensor | None = model(TOKENS).logits_BSV
    assert found is not None
    return found


def upcycled(
    moe: dict[str, Any], seed: int = 0, source: Transformer | None = None, changes: dict[str, Any] | None = None, **start: Any
) -> Transformer:
    model = sparse(moe, **(changes or {}))
    source = source or dense(**(changes or {}))
    upcycle(source.state_dict(), model, Upcycle.model_validate({"run": 1, **start}), seed)
    return model


def experts(model: Transformer) -> list[MoeLayer]:
    return [module for module in model.modules() if isinstance(module, MoeLayer)]


COPY = {"n_experts": 4, "top_k": 2, "d_expert": 48}


@pytest.mark.parametrize(
    ("moe", "start"),
    [
        (COPY, {}),
        ({**COPY, "top_k": 1}, {}),
        ({**COPY, "first_k_dense": 1, "every": 2}, {}),
        ({**COPY, "router": {"kind": "sigmoid_topk", "scale": 2.5}, "balance": [{"kind": "loss_free_bias"}]}, {}),
        ({**COPY, "router": {"kind": "softmax_topk", "renormalise": True}}, {"expand": 4}),
        ({"n_experts": 4, "top_k": 2, "d_expert": 32, "n_shared": 2, "d_shared": 8}, {}),
        ({"n_experts": 8, "top_k": 2, "d_expert": 24}, {"method": "granular", "granularity": 2}),
        ({"n_experts": 12, "top_k": 6, "d_expert": 16}, {"method": "granular", "granularity": 3, "expand": 4}),
        ({"n_experts": 8, "top_k": 4, "d_expert": 20, "n_shared": 1, "d_shared": 8}, {"method": "granular", "granularity": 2}),
        ({"n_experts": 4, "top_k": 4, "d_expert": 24, "router": {"kind": "all_experts"}}, {"method": "granular", "granularity": 2}),
    ],
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_first_logits_are_the_dense_models(moe: dict[str, Any], start: dict[str, Any], activation: str) -> None:
    source = dense(activation=activation)
    model = upcycled(moe, source=source, changes={"activation": activation}, **start)
    wanted = logits(source)
    assert wanted.std() > 0.5
    assert (logits(model) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_extra_predictions_are_upcycled_too() -> None:
    changes = {"mtp_depth": 1}
    source = dense(**changes).train()
    model = upcycled(COPY, source=source, changes=changes).train()
    ours, theirs = (one(TOKENS, TOKENS.roll(-1, 1)).mtp_loss for one in (model, source))
    assert ours is not None and theirs is not None
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_slices_that_are_not_a_whole_copy_do_not_make_the_dense_output() -> None:
    source = dense()
    model = upcycled({"n_experts": 8, "top_k": 3, "d_expert": 24}, source=source, method="granular", granularity=2)
    assert (logits(model) - logits(source)).abs().max() > 1e-2


def test_slices_are_the_hidden_units_in_order() -> None:
    source = dense()
    model = upcycled({"n_experts": 6, "top_k": 3, "d_expert": 16}, source=source, method="granular", granularity=3)
    state = source.state_dict()
    for index, layer in enumerate(experts(model)):
        w_in, w_out = state[f"blocks.{index}.ffn.w_in"], state[f"blocks.{index}.ffn.w_out"]
        for expert in range(6):
            units = range(expert % 3 * 16, expert % 3 * 16 + 16)
            for row, unit in enumerate(units):
                assert torch.equal(layer.experts.w_in[expert, row], w_in[unit])
                assert torch.equal(layer.experts.w_in[expert, 16 + row], w_in[48 + unit])
                assert torch.equal(layer.experts.w_out[expert, :, row], 3 * w_out[:, unit])
        weight = layer.router.weight
        assert isinstance(weight, Tensor)
        assert torch.equal(weight[0], weight[2]) and torch.equal(weight[3], weight[5]) and not torch.equal(weight[0], weight[3])


def test_noise_reaches_its_share_of_each_experts_units_and_no_other() -> None:
    calm, noisy = upcycled(COPY), upcycled(COPY, noise_std=0.1, noise_share=0.25)
    for before, after in zip(experts(calm), experts(noisy), strict=True):
        change_EHD, change_EDF = after.experts.w_in - before.experts.w_in, after.experts.w_out - before.experts.w_out
        touched_EF = change_EDF.ne(0).any(1)
        assert touched_EF.sum(1).tolist() == [12] * 4
        assert torch.equal(change_EHD.ne(0).any(2), touched_EF.repeat(1, 2))
        assert not torch.equal(touched_EF[0], touched_EF[1])
        spread = change_EDF.transpose(1, 2)[touched_EF].std() / before.experts.w_out.std()
        assert spread.item() == pytest.approx(0.1, rel=0.1)
    assert all(torch.equal(noisy.state_dict()[name], tensor) for name, tensor in calm.state_dict().items() if ".experts." not in name)


def test_the_seed_alone_draws_the_noise() -> None:
    one, again, other = (upcycled(COPY, seed=seed, noise_std=0.1).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not torch.equal(one["blocks.0.ffn.experts.w_in"], other["blocks.0.ffn.experts.w_in"])


@pytest.mark.parametrize(
    ("moe", "changes", "says"),
    [
        ({**COPY, "d_expert": 32}, {}, r"d_expert 32"),
        (COPY, {"d_model": 48}, r"is \[264, 32\], but model needs \[264, 48\]|not cut"),
        (COPY, {"n_layers": 2}, "no place for blocks.2"),
        (COPY, {"n_layers": 4}, "it has no blocks.3"),
        (COPY, {"activation": "gelu"}, "not cut"),
    ],
)
def test_what_does_not_fit_is_refused(moe: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        upcycle(dense().state_dict(), sparse(moe, **changes), Upcycle(run=1), 0)
