"""The MoE layer in every form a spec can give it, against loops over tokens and experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.activation import hidden
from moe.context import Context
from moe.layer import MoeLayer
from moe.model import Transformer, build_model
from moe.rope import Rope
from moe.routing import LayerOutput
from spec.model import Model

D, F, E, K = 8, 6, 5, 2


def model_of(**moe: Any) -> Model:
    described = {"n_experts": E, "top_k": K, "d_expert": F, "balance": [], **moe}
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2, "head_dim": 4}
    return Model.model_validate({"d_model": D, "n_layers": 2, "vocab_size": 32, "d_ff": 12, "attention": attention, "moe": described})


def layer_of(**moe: Any) -> MoeLayer:
    layer = MoeLayer(model_of(**moe)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.5)
    return layer


def run(layer: MoeLayer, x: Tensor) -> LayerOutput:
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    output: LayerOutput = layer(x, Context(tokens, Rope(x.shape[1], 4, 1e4, x.device)))
    return output


def expert(layer: MoeLayer, e: int, x: Tensor, activation: str) -> Tensor:
    """One expert on one token, as one reads it."""
    experts = layer.experts
    h = experts.w_in[e] @ x
    if experts.b_in is not None:
        h = h + experts.b_in[e]
    y = experts.w_out[e] @ hidden(h, activation)
    return y if experts.b_out is None else y + experts.b_out[e]


@pytest.mark.parametrize("activation", [None, "swiglu_clamped", "gelu"])
@pytest.mark.parametrize("bias", ["none", "expert", "layer"])
@pytest.mark.parametrize("kind", ["topk_softmax", "sigmoid_input"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_routed_sum_is_the_formula_with_every_gradient(activation, bias, kind, padded):
    torch.manual_seed(0)
    capacity = {"kind": "factor", "factor": 1.0, "padded": True} if padded else {}
    layer = layer_of(activation=activation, bias=bias, router={"kind": kind}, capacity=capacity)
    x = (3 * torch.randn(2, 7, D, dtype=torch.float64)).requires_grad_()
    output = run(layer, x)
    decision = layer.router(x.flatten(0, 1))
    rows = []
    for t, x_t in enumerate(x.flatten(0, 1)):
        y = torch.zeros(D, dtype=torch.float64) if layer.bias is None else layer.bias
        for k in range(K):
            e = int(output.choice.expert_TK[t, k])
            if e < E:
                g = decision.gate_TK[t, k]
                y = y + (
                    expert(layer, e, g * x_t, activation or "swiglu")
                    if kind == "sigmoid_input"
                    else g * expert(layer, e, x_t, activation or "swiglu")
                )
        rows.append(y)
    wanted = torch.stack(rows).view_as(x)
    assert bool((output.choice.expert_TK == E).any()) is padded
    torch.testing.assert_close(output.y_BSD, wanted)
    weight = torch.randn_like(wanted)
    given = [x, *(parameter for parameter in layer.parameters())]
    for got, right in zip(*(torch.autograd.grad((y * weight).sum(), given) for y in (output.y_BSD, wanted)), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("combine", ["sum", "sigmoid_gate", "residual"])
def test_the_shared_expert_joins_as_the_spec_says(combine):
    torch.manual_seed(1)
    layer = layer_of(n_shared=1, combine=combine)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    alone = MoeLayer(model_of()).double()
    alone.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if name.startswith(("router.", "experts."))})
    routed, shared = run(alone, x).y_BSD, layer.shared(x)
    y = run(layer, x).y_BSD
    for b in range(2):
        for s in range(3):
            if combine == "sum":
                wanted = routed[b, s] + shared[b, s]
            elif combine == "sigmoid_gate":
                wanted = routed[b, s] + shared[b, s] / (1 + math.exp(-float(layer.shared_gate[0] @ x[b, s])))
            else:
                one, two = (math.exp(float(layer.mix.weight[i] @ x[b, s] + layer.mix.bias[i])) for i in range(2))
                wanted = (one * routed[b, s] + two * shared[b, s]) / (one + two)
            torch.testing.assert_close(y[b, s], wanted)


def test_expert_biases_start_at_zero_and_are_not_decayed():
    from moe.train.optimizer import AdamW
    from spec.training import Optimizer

    model = build_model(model_of(bias="expert", n_shared=1, combine="residual", activation="swiglu_clamped"))
    biases = [name for name, _ in model.named_parameters() if name.endswith(("b_in", "b_out", "mix.bias"))]
    assert len(biases) == 6 and all(not model.get_parameter(name).any() for name in biases)
    assert set(biases) <= set(AdamW(model, Optimizer()).groups["plain"].names)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_padded_experts_give_what_unpadded_ones_give(precision):
    torch.manual_seed(2)
    capacity = {"kind": "factor", "factor": 0.8, "drop": "probability"}
    models = [build_model(model_of(capacity={**capacity, "padded": padded}, bias="expert", activation="swiglu_clamped")) for padded in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    tokens = torch.randint(0, 32, (3, 16))
    outputs = []
    for model in models:
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            output = model(tokens, tokens)
        assert output.lm_loss is not None
        output.lm_loss.backward()
        outputs.append(output)
    most = 1e-5 if precision == torch.float32 else 2e-2
    assert torch.equal(outputs[0].stats.dropped_LE, outputs[1].stats.dropped_LE) and outputs[0].stats.dropped_LE.sum() > 0
    torch.testing.assert_close(outputs[0].lm_loss, outputs[1].lm_loss, rtol=most, atol=most)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert (one.grad - two.grad).norm() <= most * one.grad.norm() + 1e-7, name


def company(model: Transformer, seed: int) -> float:
    """How far a sequence's logits move when three others come into its batch: the largest difference."""
    tokens = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(seed))
    model.eval()
    with torch.no_grad():
        alone, among = model(tokens[:1]).logits_BSV, model(tokens).logits_BSV
    return float((alone[0] - among[0]).abs().max())


def spread_out(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)


@pytest.mark.parametrize("kind", ["topk_softmax", "sigmoid_topk", "noisy_topk", "switch", "hash"])
def test_without_drops_a_sequence_does_not_depend_on_its_batch_and_with_them_it_does(kind):
    torch.manual_seed(3)
    moe = {"router": {"kind": kind}, "top_k": 1 if kind == "switch" else 2}
    free, tight = build_model(model_of(**moe)), build_model(model_of(**moe, capacity={"kind": "factor", "eval_factor": 1.0}))
    spread_out(free)
    tight.load_state_dict(free.state_dict())
    assert max(company(free, seed) for seed in range(5)) < 1e-4
    assert max(company(tight, seed) for seed in range(5)) > 1e-2


def test_with_expert_choice_a_sequence_depends_on_its_batch():
    torch.manual_seed(4)
    model = build_model(model_of(router={"kind": "expert_choice"}))
    spread_out(model)
    assert max(company(model, seed) for seed in range(5)) > 1e-2


@pytest.mark.parametrize("training", [True, False])
def test_next_best_drops_less_and_tells_what_it_moved(training):
    torch.manual_seed(5)
    capacity = {"kind": "factor", "factor": 1.0, "eval_factor": 1.0}
    dropping, offering = (layer_of(capacity={**capacity, "overflow": overflow}).train(training) for overflow in ("drop", "next_best"))
    offering.load_state_dict(dropping.state_dict())
    x = torch.randn(4, 10, D, dtype=torch.float64)
    before, after = run(dropping, x), run(offering, x)
    assert after.stats.dropped_E.sum() < before.stats.dropped_E.sum()
    assert float(after.stats.figures["rerouted"]) > 0 and "rerouted" not in before.stats.figures
    assert torch.equal(after.stats.expert_tokens_E, before.stats.expert_tokens_E)  # what the router wanted
    assert int((after.choice.expert_TK == E).sum()) == int(after.stats.dropped_E.sum())
