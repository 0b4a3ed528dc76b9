"""Multi-token prediction against a loop over positions, and what it may not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.context import Context
from moe.model import Output, Transformer, build_model
from moe.mtp import MtpModule
from moe.rope import Rope, rotated_width
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.model import Model

MOE: dict[str, Any] = {"n_experts": 6, "top_k": 2, "d_expert": 24}
PLAIN: dict[str, Any] = {"n_layers": 2, "d_model": 32, "d_ff": 48, "vocab_size": 264, "init_std": 0.2, "mtp_weight": 0.3, "moe": MOE}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, biased, latent": {
        "tie_embeddings": False,
        "lm_head_bias": True,
        "attention": {"kind": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    },
    "layernorm, sandwich": {"norm": "layernorm", "norm_bias": True, "sandwich_norm": True},
    "dense": {"moe": None},
    "last layer dense": {"n_layers": 3, "moe": MOE | {"every": 2}},
}


def model(name: str = "tied", **changes: Any) -> Transformer:
    torch.manual_seed(0)
    return build_model(Model.model_validate(PLAIN | {"mtp_depth": 2} | VARIANTS[name] | changes))


def batch(length: int = 14) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 264, (2, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def total(output: Output) -> Tensor:
    assert output.lm_loss is not None and output.mtp_loss is not None
    return output.lm_loss + output.balance_loss + output.mtp_loss


def looped(built: Transformer, tokens: Tensor, stream: Tensor, documents: list[int] | None = None) -> float:
    """The mean over depths of the mean cross-entropy, for one sequence of ids t_0 .. t_S, with `stream` [S, D] after the last layer."""
    spec, length = built.spec, len(stream)
    matrix = built.embedding.weight if built.head is None else built.head
    means = []
    states = {i: stream[i] for i in range(length)}
    for depth in range(1, spec.mtp_depth + 1):
        module = built.mtp[depth - 1]
        assert isinstance(module, MtpModule)
        places = range(length - depth)
        merged = {}
        for i in places:
            pair = torch.cat([module.stream_norm(states[i]), module.embedding_norm(built.embedding.weight[tokens[i + depth]])])
            merged[i] = module.project.weight @ pair
        context = Context(
            tokens[None, depth:length],
            Rope(len(places), rotated_width(spec), spec.rope_theta, torch.device("cpu")),
            None if documents is None else torch.tensor([documents[: len(places)]]),
        )
        output = module.block(torch.stack([merged[i] for i in places])[None], context).x_BSD[0]
        states = {i: output[i] for i in places}
        losses = []
        for i in places:
            if documents is None or documents[i] == documents[i + depth]:
                logits = matrix @ module.norm(states[i]) + (0.0 if built.head_bias is None else built.head_bias)
                losses.append(float(torch.logsumexp(logits, 0) - logits[tokens[i + depth + 1]]))
        means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


def stream_of(built: Transformer, tokens_BS: Tensor, documents: Tensor | None = None) -> Tensor:
    """The residual stream after the last layer."""
    seen: list[Tensor] = []
    handle = built.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output.x_BSD))
    built(tokens_BS, document_BS=documents)
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_as_a_loop(name: str) -> None:
    built = model(name).eval()
    tokens_BS, targets_BS = batch()
    got = built(tokens_BS, targets_BS).mtp_loss
    stream_BSD = stream_of(built, tokens_BS)
    ids = torch.cat((tokens_BS, targets_BS[:, -1:]), 1)
    wanted = sum(looped(built, ids[b], stream_BSD[b]) for b in range(2)) / 2
    assert float(got) == pytest.approx(0.3 * wanted, rel=1e-5)


@torch.no_grad()
def test_nothing_crosses_from_document_to_document() -> None:
    built = model().eval()
    tokens_BS, targets_BS = (part[:1] for part in batch())
    documents = [0] * 5 + [1] * 6 + [2] * 3
    document_BS = torch.tensor([documents])
    got = built(tokens_BS, targets_BS, document_BS).mtp_loss
    ids = torch.cat((tokens_BS, targets_BS[:, -1:]), 1)[0]
    wanted = looped(built, ids, stream_of(built, tokens_BS, document_BS)[0], documents)
    assert float(got) == pytest.approx(0.3 * wanted, rel=1e-5)


def test_the_main_model_is_the_same_with_and_without() -> None:
    """The same first weights, logits and loss: the extra blocks only add to what is minimised."""
    with_it, without = model(), model(mtp_depth=0)
    plain = dict(without.named_parameters())
    assert all(torch.equal(parameter, plain[name]) for name, parameter in with_it.named_parameters() if not name.startswith("mtp."))
    tokens_BS, targets_BS = batch()
    ours, theirs = with_it(tokens_BS, targets_BS), without(tokens_BS, targets_BS)
    assert torch.equal(ours.lm_loss, theirs.lm_loss) and theirs.mtp_loss is None
    assert with_it(tokens_BS).mtp_loss is None


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns_and_the_loss_falls(name: str) -> None:
    built = model(name, init_std=0.02)
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        output = built(*batch())
        optimizer.zero_grad()
        total(output).backward()
        optimizer.step()
        losses.append(float(output.mtp_loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in built.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputing_activations_changes_nothing(name: str) -> None:
    results = []
    for recompute in (False, True):
        built = model(name, dropout=0.1)
        built.recompute = recompute
        torch.manual_seed(5)
        output = built(*batch())
        total(output).backward()
        results.append((total(output).detach(), [p.grad for p in built.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_its_layers_have_rows_of_their_own() -> None:
    built = model()
    stats = built(*batch()).stats
    assert built.moe_layers == (0, 1, 2, 3)
    assert stats.expert_tokens_LE.sum(1).tolist() == [56, 56, 52, 48]  # 2 sequences of 14 tokens, two experts each
    assert model("last layer dense").moe_layers == (1,)
    assert model("dense")(*batch()).stats is None
    biased = model(moe=MOE | {"router": {"kind": "sigmoid_topk"}, "balance": [{"kind": "loss_free_bias"}]})
    biased.update_balance(biased(*batch()).stats)
    bias_LE = biased.expert_bias()
    assert bias_LE is not None and bias_LE.shape == (4, 6) and (bias_LE.abs().sum(1) > 0).all()


def test_targets_that_are_not_predicted_are_not_predicted_ahead_either() -> None:
    built = model().eval()
    tokens_BS, targets_BS = batch()
    targets_BS = targets_BS.clone()
    targets_BS[:, 9:] = -100
    short = built(tokens_BS[:, :9], targets_BS[:, :9]).mtp_loss
    torch.testing.assert_close(built(tokens_BS, targets_BS).mtp_loss, short, rtol=1e-4, atol=1e-5)
    assert built(tokens_BS, torch.full_like(targets_BS, -100)).mtp_loss.item() == 0.0


@pytest.mark.parametrize("name", VARIANTS)
def test_as_many_parameters_as_counted(name: str) -> None:
    built = model(name)
    cost = price(ExperimentSpec(model=built.spec))
    assert sum(p.numel() for p in built.parameters()) == cost.total_params + cost.mtp_params


def test_sequences_must_reach_far_enough() -> None:
    with pytest.raises(ValueError, match="mtp_depth 2 needs sequences of more tokens than that, not of 2"):
        model()(*batch(2))
    with pytest.raises(ValueError, match=r"data.seq_len 8 must be > model.mtp_depth 8"):
        ExperimentSpec.model_validate({"model": {"mtp_depth": 8}, "data": {"seq_len": 8}})
