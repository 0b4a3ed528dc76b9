"""Generation with a cache gives what the whole forward pass gives, and keeps as many bytes as the accountant says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.cache import KvCache, LayerCache
from moe.model import Transformer, build_model
from spec.accounting import price
from spec.experiment import ExperimentSpec
from spec.model import Model

MOE = {"n_experts": 6, "top_k": 2, "d_expert": 24}
GQA = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2}
MLA = {"kind": "mla", "n_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "grouped": GQA,
    "normalised, biased": GQA | {"qk_norm": "full", "bias": True},
    "latent": MLA,
    "latent without query rank": MLA | {"q_lora_rank": 0},
}
YARN = {"kind": "yarn", "factor": 4, "trained_len": 16, "mscale": 0.7, "mscale_all_dim": 1.2}
LONGROPE = {"kind": "longrope", "short_factor": [1, 1.5, 2, 3], "long_factor": [2, 3, 4, 5], "trained_len": 16, "max_len": 64}
# Fields of the model, and how many of 24 positions the first layer keeps.
LIMITED: dict[str, tuple[dict[str, Any], int]] = {
    "window and sinks": ({"attention": GQA | {"sinks": True, "sliding_window": 5, "full_every": 2}}, 4),
    "window of one": ({"attention": GQA | {"sliding_window": 1, "full_every": 3}}, 0),
    "chunks": ({"attention": GQA | {"chunk": 7, "nope_every": 2, "temperature_floor": 4, "qk_norm": "l2"}}, 3),
    "experts": ({"attention": GQA | {"experts": {"n_experts": 5, "top_k": 2}, "qk_norm": "full"}}, 24),
    "yarn": ({"attention": MLA, "rope_scaling": YARN}, 24),
    "longrope": ({"attention": GQA, "rope_scaling": LONGROPE}, 24),
    "extra predictions": ({"attention": GQA, "mtp_depth": 1}, 24),
}


def model(attention: dict[str, Any], **changes: Any) -> Transformer:
    """In evaluation mode, with weights large enough that attention matters."""
    plain: dict[str, Any] = {"n_layers": 3, "d_model": 32, "vocab_size": 264, "init_std": 0.2, "moe": MOE, "attention": attention}
    torch.manual_seed(0)
    return build_model(Model.model_validate(plain | changes)).eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 264, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def in_pieces(built: Transformer, tokens_BS: Tensor, sizes: list[int], cache: KvCache, **more: Tensor) -> Tensor:
    pieces = zip(tokens_BS.split(sizes, 1), *(extra.split(sizes, 1) for extra in more.values()), strict=True)
    logits = [built(piece, cache=cache, **dict(zip(more, rest, strict=True))).logits_BSV for piece, *rest in pieces]
    return torch.cat([part for part in logits if part is not None], 1)


@pytest.mark.parametrize("sizes", [[1] * 24, [9, *[1] * 15], [5, 1, 7, 11]])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_token_by_token_as_all_at_once(name: str, sizes: list[int]) -> None:
    built, tokens_BS = model(ATTENTIONS[name]), tokens(2, 24)
    got = in_pieces(built, tokens_BS, sizes, built.new_cache(2))
    with torch.no_grad():
        wanted = built(tokens_BS).logits_BSV
    assert wanted is not None and wanted.std() > 1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 24, [9, *[1] * 15], [5, 1, 7, 11]])
@pytest.mark.parametrize("name", LIMITED)
def test_layers_that_see_less_keep_less(name: str, sizes: list[int]) -> None:
    changes, kept = LIMITED[name]
    built, tokens_BS = model(**changes), tokens(2, 24)
    cache = built.new_cache(2, length=24)
    got = in_pieces(built, tokens_BS, sizes, cache)
    with torch.no_grad():
        wanted = built(tokens_BS).logits_BSV
    assert wanted is not None
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    assert all(tensor.shape[1] == kept for tensor in cache.layers[0].tensors)
    # In each case but one the second layer is not limited.
    assert all(tensor.shape[1] == 24 for tensor in cache.layers[1].tensors) or name == "window of one"


@torch.no_grad()
def test_longrope_needs_the_length_to_cross_the_trained_one() -> None:
    built = model(GQA, rope_scaling=LONGROPE)
    cache = built.new_cache(2)
    built(tokens(2, 16), cache=cache)
    with pytest.raises(ValueError, match="trained_len 16"):
        built(tokens(2, 1), cache=cache)
    built(tokens(2, 17), cache=built.new_cache(2))  # beyond from the start


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_token_costs_what_the_accountant_says(name: str, precision: str) -> None:
    built = model(ATTENTIONS[name])
    spec = ExperimentSpec.model_validate({"model": built.spec.model_dump(), "training": {"precision": precision}})
    cache = built.new_cache(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        in_pieces(built, tokens(3, 17), [10, 1, 6], cache)
    assert cache.position == 17
    assert cache.size_bytes == 3 * 17 * price(spec).kv_cache_bytes_per_token


@pytest.mark.parametrize("name", ["window and sinks", "chunks", "yarn"])
def test_a_sequence_needs_at_most_what_the_accountant_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that each layer works with at a time, token by token."""
    built = model(**LIMITED[name][0])
    spec = ExperimentSpec.model_validate({"model": built.spec.model_dump(), "data": {"seq_len": 24}})
    most: dict[LayerCache, int] = {}
    extend = LayerCache.extend

    def noted(self: LayerCache, start: int, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole = extend(self, start, new)
        most[self] = max(most.get(self, 0), sum(tensor.numel() * tensor.element_size() for tensor in whole))
        return whole

    monkeypatch.setattr(LayerCache, "extend", noted)
    in_pieces(built, tokens(1, 24), [1] * 24, built.new_cache(1, 24))
    assert sum(most.values()) == price(spec).kv_cache_bytes_per_sequence


def test_a_latent_cache_holds_the_latent_and_one_rotated_key() -> None:
    built = model(MLA)
    cache = built.new_cache(2)
    in_pieces(built, tokens(2, 5), [5], cache)
    assert [tuple(tensor.shape) for tensor in cache.layers[0].tensors] == [(2, 5, 24), (2, 5, 1, 4)]


def test_documents_are_apart_across_calls() -> None:
    built, tokens_BS = model(GQA), tokens(2, 12)
    document_BS = torch.tensor([[0] * 5 + [1] * 7, [3] * 9 + [4] * 3])
    got = in_pieces(built, tokens_BS, [4, 1, 1, 6], built.new_cache(2), document_BS=document_BS)
    with torch.no_grad():
        wanted, together = built(tokens_BS, document_BS=document_BS).logits_BSV, built(tokens_BS).logits_BSV
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert wanted is not None and together is not None and not torch.allclose(wanted, together, atol=0.1)


@torch.no_grad()
@torch.no_grad()
def test_losses_with_a_cache_leave_extra_blocks_out_of_it() -> None:
    built, tokens_BS = model(GQA, mtp_depth=1), tokens(2, 12)
    targets_BS = tokens_BS.roll(-1, 1)
    cache = built.new_cache(2)
    parts = [built(part, target, cache=cache) for part, target in zip(tokens_BS.split(6, 1), targets_BS.split(6, 1), strict=True)]
    assert [layer.tensors[0].shape[1] for layer in cache.layers] == [12] * 3
    assert all(part.mtp_loss is None for part in parts)
    whole = built(tokens_BS, targets_BS)
    torch.testing.assert_close(torch.stack([part.lm_loss for part in parts if part.lm_loss is not None]).mean(), whole.lm_loss)
    assert whole.mtp_loss is not None


def test_what_does_not_fit_is_refused() -> None:
    built = model(GQA)
    with pytest.raises(ValueError, match="for 2 sequences, not 3"):
        built(tokens(3, 4), cache=built.new_cache(2))
    cache = built.new_cache(2, length=6)
    built(tokens(2, 4), cache=cache)
    with pytest.raises(ValueError, match="for 6 tokens; it has seen 4, and 3 more"):
        built(tokens(2, 3), cache=cache)
    with pytest.raises(ValueError, match="documents"):
        built(tokens(2, 1), document_BS=torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="evaluation mode"):
        built.train()(tokens(2, 1), cache=built.new_cache(2))
