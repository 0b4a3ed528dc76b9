"""Routers of every kind inside a model: sizes, gradients, recompute, saving, and the loss of those that learn by policy gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model import Output, Transformer, build_model
from moe.router_policy import policy_loss
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.model import Model
from spec.routing import TRAITS

SCORERS = [f"softmax_topk {scorer}" for scorer in ("cosine", "mlp")]
VARIANTS = [*TRAITS, *SCORERS, "hash mtp", "reinforce mtp"]


def spec(variant: str, **router: Any) -> Model:
    kind, _, extra = variant.partition(" ")
    traits = TRAITS[kind]
    moe: dict[str, Any] = {"n_experts": 6, "top_k": 6 if kind == "all_experts" else traits.top_k or 2, "d_expert": 16}
    moe["balance"] = [{"kind": "switch_aux"}] if traits.learned else []
    moe["router"] = {"kind": kind, "bias": traits.learned, "jitter": 0.2 if kind == "sparsemixer" else 0.0, **router}
    if extra in ("cosine", "mlp"):
        moe["router"] |= {"scorer": extra, "scorer_dim": 8}
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2}
    return Model.model_validate(
        {"n_layers": 2, "d_model": 16, "d_ff": 32, "vocab_size": 264, "attention": attention, "moe": moe, "mtp_depth": int(extra == "mtp")}
    )


def model(variant: str, seed: int = 0, **router: Any) -> Transformer:
    torch.manual_seed(seed)
    return build_model(spec(variant, **router))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 264, (3, 21), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss(output: Output) -> Tensor:
    assert output.lm_loss is not None
    return output.lm_loss + output.balance_loss + (0 if output.mtp_loss is None else output.mtp_loss)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_as_many_as_the_accountant_counts(variant):
    wanted = ExperimentSpec(model=spec(variant))
    priced = price(wanted)
    assert sum(p.numel() for p in build_model(wanted.model).parameters()) == priced.total_params + priced.mtp_params


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_and_the_loss_falls(variant):
    built = model(variant)
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    losses, moved = [], dict.fromkeys(dict(built.named_parameters()), 0.0)
    for _ in range(15):
        output = built(*batch())
        optimizer.zero_grad()
        loss(output).backward()
        optimizer.step()
        losses.append(output.lm_loss.item())
        for name, parameter in built.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            moved[name] += float(parameter.grad.abs().max())
    assert losses[-1] < losses[0] - 0.3
    assert all(moved.values()), [name for name, size in moved.items() if not size]


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_activations_draws_the_same_and_changes_nothing(variant):
    results = []
    for recompute in (False, True):
        built = model(variant)
        built.recompute = recompute
        torch.manual_seed(5)
        output = built(*batch())
        loss(output).backward()
        results.append((output, [p.grad for p in built.parameters()]))
    (plain, gradients), (again, gradients_again) = results
    assert torch.equal(loss(plain), loss(again))
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert plain.stats is not None and again.stats is not None
    assert torch.equal(plain.stats.expert_tokens_LE, again.stats.expert_tokens_LE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_predicts_the_same(variant):
    built, fresh = model(variant), model(variant, seed=8)
    assert not torch.equal(built(batch()[0]).logits_BSV, fresh(batch()[0]).logits_BSV)
    fresh.load_state_dict(built.state_dict())
    first, second = (m.eval()(batch()[0]).logits_BSV for m in (built, fresh))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", TRAITS)
def test_counts_are_of_the_assignments_that_were_made(kind):
    built = model(kind)
    moe = built.spec.moe
    assert moe is not None
    tokens, targets = batch()
    for mode in (True, False):
        stats = built.train(mode)(tokens, targets).stats
        assert stats is not None and stats.expert_tokens_LE.shape == (2, 6)
        made = stats.expert_tokens_LE.sum(1)
        if kind == "gshard" and mode:
            kept = 60 * (1 + stats.figures["second_kept"])
            assert float(made.double().mean()) == pytest.approx(float(kept), rel=1e-5)
        elif kind == "expert_choice":
            assert (stats.expert_tokens_LE == 20).all()
        else:
            assert (made == 60 * moe.top_k).all()
        if kind == "linear_assignment" and mode:
            assert (stats.expert_tokens_LE == 10).all()


@pytest.mark.parametrize("variant", ["reinforce", "reinforce mtp"])
def test_the_policy_learns_from_the_tokens_losses(variant):
    """The loss is what the parts give that the same draws give again; and no gradient of the policy reaches the last experts."""
    built = model(variant, policy_weight=0.5, entropy_bonus=0.25)
    tokens, targets = batch()
    targets = targets.clone()
    targets[0, :7] = -100
    seen: list[Any] = []
    for block in built.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output.ffn))
    torch.manual_seed(2)
    output = built(tokens, targets)
    main = seen[-2:]
    torch.manual_seed(2)
    logits = built(tokens).logits_BSV
    per_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    wanted = [policy_loss(per_token, targets.flatten(), layer.log_prob_T) for layer in main]
    assert output.stats is not None
    if variant == "reinforce":
        torch.testing.assert_close(output.stats.figures["policy_loss"], torch.stack(wanted).mean().detach())
        parts = sum(layer.loss for layer in main) + 0.5 * sum(wanted)
        torch.testing.assert_close(output.balance_loss, parts)
        entropy = float(output.stats.router_entropy_L.sum())
        aux = 0.01 * float(output.stats.balance_loss_LT.sum())
        assert float(output.balance_loss) == pytest.approx(0.5 * float(sum(wanted)) - 0.25 * entropy + aux, rel=1e-4)
    output.balance_loss.backward()
    for name, parameter in built.named_parameters():
        if name.startswith("mtp.0.block.ffn.experts." if built.mtp else "blocks.1.ffn.experts."):
            assert parameter.grad is None or not parameter.grad.any(), name
        if name.endswith("router.weight"):
            assert parameter.grad is not None and parameter.grad.any(), name
    assert "policy_loss" not in built(tokens).stats.figures
    assert "policy_loss" not in built.eval()(tokens, targets).stats.figures


def test_router_parameters_are_all_of_the_routers():
    for variant, count in (("noisy_topk", 3), ("softmax_topk cosine", 4), ("hash", 0), ("switch", 2)):
        built = model(variant)
        assert len(built.router_parameters()) == 2 * count
        weights = [p for p in built.router_parameters() if p.dim() == 2]
        assert all(0.01 < float(p.detach().std()) < 0.03 for p in weights)
        assert all(not p.any() for name, p in built.named_parameters() if name.endswith("router.bias"))
