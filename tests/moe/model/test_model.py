"""The whole model: sizes, statistics, recompute, balancing and what may not influence what."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from moe.model import Output, Transformer, build_model
from moe.routing import RoutingStats
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.model import Model
from spec.presets import load, names
from spec.trainable import problems

MOE = {"n_experts": 6, "top_k": 2, "d_expert": 24}
ALL_TERMS = [{"kind": "switch_aux"}, {"kind": "sequence_aux"}, {"kind": "z_loss"}]
VARIANTS: dict[str, dict] = {
    "mixtral": {"moe": MOE},
    "dense": {"moe": None},
    "untied, gqa, biases": {
        "tie_embeddings": False,
        "lm_head_bias": True,
        "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "bias": True, "output_bias": True, "qk_norm": "head"},
        "moe": MOE,
    },
    "olmoe": {
        "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 4, "qk_norm": "full"},
        "moe": MOE | {"router": {"kind": "softmax_topk"}, "balance": ALL_TERMS},
    },
    "deepseek": {
        "attention": {
            "kind": "mla", "n_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        },
        "moe": MOE | {
            "n_shared": 2, "first_k_dense": 1, "combine": "sigmoid_gate",
            "router": {"kind": "sigmoid_topk", "n_groups": 3, "top_groups": 2, "scale": 2.5},
            "balance": [{"kind": "loss_free_bias"}, {"kind": "sequence_aux"}],
        },
    },
    "switch": {
        "norm": "layernorm", "norm_bias": True, "activation": "relu", "dropout": 0.1,
        "moe": MOE | {
            "top_k": 1, "every": 2, "router": {"kind": "switch", "jitter": 0.01},
            "capacity": {"kind": "factor", "factor": 1.0, "eval_factor": 0.5, "drop": "probability"},
        },
    },
    "gpt-oss": {
        "attention": {
            "kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "bias": True, "output_bias": True, "sinks": True, "sliding_window": 5, "full_every": 2,
        },
        "rope_scaling": {"kind": "yarn", "factor": 4, "trained_len": 16, "truncate": False}, "moe": MOE,
    },
    "llama 4": {
        "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": "l2", "chunk": 7, "nope_every": 2, "temperature_floor": 4},
        "rope_scaling": {"kind": "llama3", "trained_len": 16}, "moe": MOE | {"every": 2},
    },
    "jetmoe": {
        "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "output_bias": True, "experts": {"n_experts": 5, "top_k": 2}},
        "moe": MOE | {"balance": ALL_TERMS},
    },
    "grok, clipped": {
        "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "clip_qkv": 0.5}, "sandwich_norm": True,
        "rope_scaling": {"kind": "linear", "factor": 2}, "moe": MOE,
    },
    "ahead": {"mtp_depth": 1, "moe": MOE, "tie_embeddings": False},
}  # fmt: skip


def spec(name: str, **changes: object) -> Model:
    base = {"n_layers": 3, "d_model": 32, "d_ff": 48, "vocab_size": 264, "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 4}}
    return Model.model_validate(base | VARIANTS[name] | changes)


def model(name: str, *, seed: int = 0, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    return build_model(spec(name, **changes))


def batch(n_sequences: int = 3, length: int = 20, seed: int = 1) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 264, (n_sequences, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def loss(output: Output) -> Tensor:
    assert output.lm_loss is not None
    return output.lm_loss + output.balance_loss + (0.0 if output.mtp_loss is None else output.mtp_loss)


def stats_of(output: Output) -> RoutingStats:
    assert output.stats is not None
    return output.stats


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_as_many_as_the_accountant_counts(name):
    experiment_spec = ExperimentSpec(model=spec(name))
    with torch.device("meta"):
        built = build_model(experiment_spec.model)
    cost = price(experiment_spec)
    assert sum(p.numel() for p in built.parameters()) == cost.total_params + cost.mtp_params


@pytest.mark.parametrize("name", [name for name in names() if not problems(load(name))])
def test_published_sizes_are_built_as_counted(name):
    preset = load(name)
    shrunk = preset.model_copy(update={"model": preset.model.model_copy(update={"n_layers": min(preset.model.n_layers, 6)})})
    with torch.device("meta"):
        built = build_model(shrunk.model)
    cost = price(shrunk)
    assert sum(p.numel() for p in built.parameters()) == cost.total_params + cost.mtp_params


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_finite_gradient_and_training_lowers_the_loss(name):
    built = model(name)
    optimizer = torch.optim.AdamW(built.parameters(), lr=3e-3)
    tokens, targets = batch()
    first = last = None
    for _ in range(12):
        output = built(tokens, targets)
        optimizer.zero_grad()
        loss(output).backward()
        optimizer.step()
        if output.stats is not None:
            built.update_balance(output.stats)
        last = output.lm_loss.item()
        first = first or last
    assert first is not None and last is not None and last < first - 0.5
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dense"])
def test_statistics_add_up(name):
    built = model(name)
    tokens, targets = batch()
    for mode in (True, False):
        output = built.train(mode)(tokens, targets)
        stats = stats_of(output)
        moe = built.spec.moe
        assert moe is not None
        n_layers, n_tokens = len(built.moe_layers), tokens.numel()
        assert stats.expert_tokens_LE.shape == stats.dropped_LE.shape == stats.router_prob_LE.shape == (n_layers, moe.n_experts)
        assert stats.expert_tokens_LE.dtype == stats.dropped_LE.dtype == torch.int64
        seen_L = torch.tensor([n_tokens - len(tokens) * max(0, layer + 1 - built.spec.n_layers) for layer in built.moe_layers])
        assert torch.equal(stats.expert_tokens_LE.sum(1), seen_L * moe.top_k)
        assert (stats.dropped_LE >= 0).all() and (stats.dropped_LE <= stats.expert_tokens_LE).all()
        torch.testing.assert_close(stats.router_prob_LE.sum(1), torch.ones(n_layers))
        assert stats.balance_loss_LT.shape == (n_layers, len(built.balance_terms))
        assert ((stats.router_entropy_L >= 0) & (stats.router_entropy_L <= torch.log(torch.tensor(moe.n_experts)) + 1e-5)).all()
        assert not any(t.requires_grad for t in (*vars(stats).values(), *stats.figures.values()) if isinstance(t, Tensor))
        weights = torch.tensor([term.coefficient for term in moe.balance if term.kind != "loss_free_bias"])
        of_attention = stats.figures.get("moa_balance", torch.tensor(0.0))
        torch.testing.assert_close(output.balance_loss.detach(), (stats.balance_loss_LT * weights).sum() + of_attention)


def test_capacity_drops_are_counted_and_tighter_in_evaluation():
    built = model("switch")
    tokens, targets = batch(4, 30)
    for mode, factor in ((True, 1.0), (False, 0.5)):
        stats = stats_of(built.train(mode)(tokens, targets))
        most = int(-(-factor * 120 // 6))
        assert torch.equal(stats.dropped_LE, (stats.expert_tokens_LE - most).clamp_min(0))
        assert stats.dropped_LE.sum() > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputing_activations_changes_nothing(name):
    """Neither losses nor gradients to the last bit, nor a count: statistics are returned, so running twice counts once."""
    results = []
    for recompute in (False, True):
        built = model(name)
        built.recompute = recompute
        torch.manual_seed(5)
        output = built(*batch())
        loss(output).backward()
        results.append((output, [p.grad for p in built.parameters()]))
    (plain, gradients), (again, gradients_again) = results
    assert torch.equal(loss(plain), loss(again))
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    if plain.stats is not None:
        assert torch.equal(plain.stats.expert_tokens_LE, stats_of(again).expert_tokens_LE)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_seed_gives_the_same_bits(name):
    def step() -> list[Tensor]:
        built = model(name, seed=3)
        loss(built(*batch())).backward()
        return [p.grad for p in built.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))
    first, second = model(name, seed=3), model(name, seed=4)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "switch"])
def test_a_prediction_depends_on_the_past_of_its_own_sequence_alone(name):
    built = model(name).eval()
    tokens, _ = batch(4, 24)
    logits = built(tokens).logits_BSV
    torch.testing.assert_close(built(tokens[:1]).logits_BSV, logits[:1], rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 264
    torch.testing.assert_close(built(changed).logits_BSV[:, :12], logits[:, :12], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(built(changed).logits_BSV[:, 12:], logits[:, 12:], atol=1e-3)


def test_bfloat16_stays_near_float32():
    for name in VARIANTS:
        built = model(name).eval()
        tokens, targets = batch()
        exact = built(tokens, targets)
        with torch.autocast("cpu", torch.bfloat16):
            rough = built(tokens, targets)
        assert abs(exact.lm_loss.item() - rough.lm_loss.item()) < 0.02, name
        assert rough.lm_loss.dtype == torch.float32


def test_loss_without_targets_there_are_logits_and_with_them_a_loss():
    built = model("mixtral").eval()
    tokens, targets = batch()
    free, judged = built(tokens), built(tokens, targets)
    assert free.lm_loss is None and judged.logits_BSV is None
    wanted = torch.nn.functional.cross_entropy(free.logits_BSV.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(judged.lm_loss, wanted)


def test_targets_of_minus_100_are_not_predicted():
    built = model("mixtral").eval()
    tokens, targets = batch(1, 20)
    part = targets.clone()
    part[:, 10:] = -100
    torch.testing.assert_close(built(tokens, part).lm_loss, built(tokens[:, :10], targets[:, :10]).lm_loss, rtol=1e-4, atol=1e-5)


def test_the_bias_evens_out_the_load_and_stays_put_in_evaluation():
    built = model("deepseek", moe=VARIANTS["deepseek"]["moe"] | {"balance": [{"kind": "loss_free_bias", "update_rate": 0.004}]})
    tokens, _ = batch(8, 60)
    for key, buffer in built.named_buffers():
        if key.endswith("bias_E"):
            buffer[0] = 0.2  # above the differences between scores: each token takes expert 0

    def largest_share() -> float:
        counts = stats_of(built(tokens)).expert_tokens_LE
        return float((counts.max(1).values / counts.sum(1)).max())

    assert largest_share() == 0.5
    for _ in range(60):
        built.update_balance(stats_of(built(tokens)))
    assert largest_share() < 0.25  # of 6 experts
    bias = built.expert_bias()
    assert bias is not None and bias.abs().max() > 0
    built.eval().update_balance(stats_of(built(tokens)))
    assert torch.equal(built.expert_bias(), bias)


def test_the_bias_is_saved_with_the_model():
    built = model("deepseek")
    built.update_balance(stats_of(built(batch()[0])))
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    fresh = model("deepseek", seed=9)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.expert_bias(), built.expert_bias())
    assert fresh.expert_bias().abs().sum() > 0


def test_merged_micro_batches_sum_counts_and_average_the_rest():
    built = model("olmoe").eval()
    tokens, targets = batch(4)
    parts = [stats_of(built(tokens[i : i + 2], targets[i : i + 2])) for i in (0, 2)]
    merged, whole = RoutingStats.merged(parts), stats_of(built(tokens, targets))
    assert torch.equal(merged.expert_tokens_LE, whole.expert_tokens_LE)
    torch.testing.assert_close(merged.router_prob_LE, whole.router_prob_LE)
    torch.testing.assert_close(merged.router_entropy_L, whole.router_entropy_L)
    torch.testing.assert_close(merged.max_logit, whole.max_logit)


@pytest.mark.parametrize(("changes", "field"), [({"encoder_layers": 2}, "encoder_layers"), ({"position": "t5_relative"}, "position")])
def test_what_cannot_be_trained_is_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        build_model(spec("mixtral", **changes))
