"""Writing with a cache against whole forward passes, and the draw against its definition in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.model import Transformer, build_model
from moe.sample import Sampling, depends_on_batch, draw, write
from spec.model import Model
from spec.routing import TRAITS, RouterKind

V, END = 50, 49
GQA = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1}
MLA = {"kind": "mla", "n_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
BIASED = {"router": {"kind": "sigmoid_topk"}, "balance": [{"kind": "loss_free_bias"}]}


def model(moe: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    torch.manual_seed(5)
    sparse = {"n_experts": 4, "top_k": 2, "d_expert": 16, "router": {"init_std": 0.5}, **(moe or {})}
    plain = {"vocab_size": V, "d_model": 16, "n_layers": 3, "d_ff": 32, "init_std": 0.3, "attention": GQA, "moe": sparse}
    return build_model(Model.model_validate({**plain, **changes})).double().eval()


def dense() -> Transformer:
    return build_model(Model.model_validate({"vocab_size": V, "d_model": 16, "n_layers": 2, "d_ff": 32, "attention": GQA, "moe": None})).eval()


def forward(built: Transformer, ids: list[int]) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """(logits [S, V], experts and gates of each layer [S, K]) of one pass over everything."""
    with torch.no_grad():
        output = built(torch.tensor([ids]))
    return (
        output.logits_BSV[0].numpy(),
        [choice.expert_TK.numpy() for choice in output.choices],
        [choice.gate_TK.numpy() for choice in output.choices],
    )


@pytest.mark.parametrize(
    ("moe", "changes"),
    [({}, {}), (BIASED, {}), ({}, {"attention": MLA}), ({"n_shared": 1, "first_k_dense": 1}, {})],
    ids=["mixtral", "biased", "latent attention", "shared and dense"],
)
def test_greedy_tokens_are_the_argmax_of_whole_passes_and_the_experts_are_the_routers(moe: dict[str, Any], changes: dict[str, Any]) -> None:
    built = model(moe, **changes)
    if (bias := built.expert_bias()) is not None:
        for layer in built._moe_layers():
            layer.router.bias_E.copy_(torch.linspace(-0.3, 0.3, bias.shape[1]))
    prompt = [3, 1, 4, 1, 5]
    written = write(built, prompt, Sampling(tokens=12, temperature=0), vocabulary_size=END, end=END)
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(forward(built, ids)[0][-1, :END].argmax()))
    assert written.ids == ids and len(set(ids)) > 3, "the model writes something"
    logits, experts, gates = forward(built, ids)
    for place in range(len(ids)):
        assert written.experts[place] == [layer[place].tolist() for layer in experts]
        np.testing.assert_allclose(written.gates[place], [layer[place] for layer in gates], atol=1e-6)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert written.log_probs[0] is None
    np.testing.assert_allclose(written.log_probs[1:], [log_probs[i, token] for i, token in enumerate(ids[1:])], atol=1e-5)


@pytest.mark.parametrize("kind", sorted(set(TRAITS) - {"expert_choice", "random"}))
def test_every_router_that_does_not_look_at_the_batch_chooses_alike_with_and_without_a_cache(kind: RouterKind) -> None:
    top_k = 4 if kind == "all_experts" else TRAITS[kind].top_k or 2
    built = model({"top_k": top_k, "router": {"kind": kind, "init_std": 0.5}, "balance": [{"kind": "switch_aux"}] if TRAITS[kind].learned else []})
    written = write(built, [3, 1, 4, 1, 5], Sampling(tokens=6, temperature=0), vocabulary_size=V, end=V)
    logits, experts, _ = forward(built, written.ids)
    assert written.ids[5:] == logits[4:-1].argmax(-1).tolist()
    assert written.experts == [[[int(e) for e in layer[place] if e < 4] for layer in experts] for place in range(11)]


def test_where_experts_choose_tokens_the_choices_are_those_of_the_whole_text() -> None:
    built = model({"router": {"kind": "expert_choice", "init_std": 0.5}})
    written = write(built, [3, 1, 4, 1, 5], Sampling(tokens=7, temperature=0), vocabulary_size=V, end=V)
    taken = np.array([[sum(e in layers[layer] for layers in written.experts) for e in range(4)] for layer in range(3)])
    assert (taken == 6).all(), "each expert takes k T / E = 2 * 12 / 4 tokens"


def test_under_a_capacity_the_choices_are_those_of_the_whole_text() -> None:
    built = model({"capacity": {"kind": "factor", "eval_factor": 0.7}})
    assert depends_on_batch(built.spec) and not depends_on_batch(model().spec)
    written = write(built, [3, 1, 4, 1, 5], Sampling(tokens=10, temperature=0), vocabulary_size=V, end=V)
    _, experts, _ = forward(built, written.ids)
    for place, layers in enumerate(written.experts):
        assert layers == [[int(expert) for expert in layer[place] if expert < 4] for layer in experts]
    with torch.no_grad():
        stats = built(torch.tensor([written.ids])).stats
    assert stats is not None and int(stats.dropped_LE.sum()) > 0
    assert sum(len(layer) for layers in written.experts for layer in layers) == int((stats.expert_tokens_LE - stats.dropped_LE).sum())


def test_a_dense_model_writes_without_choices() -> None:
    written = write(dense(), [1], Sampling(tokens=3, seed=2), vocabulary_size=V, end=V)
    assert len(written.ids) == 4 and written.experts == [[], [], [], []]


def test_the_end_of_a_document_ends_the_text() -> None:
    built = model()
    first = write(built, [3, 1], Sampling(tokens=5, temperature=0), vocabulary_size=V, end=V)
    second = write(built, [3, 1], Sampling(tokens=5, temperature=0), vocabulary_size=V, end=first.ids[2])
    assert second.ended and second.ids == first.ids[:3] and len(second.experts) == 3
    assert not first.ended


def test_the_same_seed_writes_the_same_text_and_an_empty_prompt_is_refused() -> None:
    built = model()
    one, two, other = (write(built, [3], Sampling(tokens=20, temperature=2, seed=seed), vocabulary_size=V, end=V).ids for seed in (1, 1, 2))
    assert one == two != other
    with pytest.raises(ValueError, match="prompt"):
        write(built, [], Sampling(), vocabulary_size=V, end=V)


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=9, unique=True),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.05, 1),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_only_tokens_of_the_nucleus_are_drawn(logits: list[float], temperature: float, top_k: int, top_p: float, seed: int) -> None:
    scaled = np.array(np.float32(logits), float) / temperature
    prob = np.exp(scaled - scaled.max())
    prob /= prob.sum()
    order = np.argsort(-prob, kind="stable")[: top_k or None]
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p * prob[order].sum() + 1e-9:
            break
        kept.append(int(token))
        mass += prob[token]
    token = draw(torch.tensor(logits), Sampling(1, temperature, top_p, top_k), torch.Generator().manual_seed(seed))
    assert token in kept


def test_draws_have_the_right_frequencies() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([draw(logits, Sampling(1, 0.7, 1.0, 3), generator) for _ in range(6000)], minlength=4) / 6000
    wanted = np.exp(np.array([1.0, 0.0, 2.0]) / 0.7)
    np.testing.assert_allclose(drawn, [*(wanted / wanted.sum()), 0.0], atol=0.02)
