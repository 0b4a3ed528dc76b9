"""The accountant against tensors listed one by one, and against the absurd."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spec.accounting import PARTS, bytes_text, check_size, count_text, price, table
from spec.experiment import ExperimentSpec
from tests.spec import oracle
from tests.spec.strategies import specs

DRAWN = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@DRAWN
@given(specs())
def test_agrees_with_every_tensor_listed(spec: ExperimentSpec) -> None:
    cost = price(spec)
    total, active = oracle.by_part(spec.model, active=False), oracle.by_part(spec.model, active=True)
    ahead = sum(tensor.size for tensor in oracle.mtp_tensors(spec.model))
    assert cost.by_part == {part: total[part] for part in PARTS} | {"mtp": ahead}
    assert cost.active_by_part == {part: active[part] for part in PARTS}
    assert cost.mtp_params == ahead
    assert cost.total_params == total.total()
    assert cost.flops_per_token.forward == oracle.forward_flops(spec)
    assert cost.flops_per_token.training == oracle.training_flops(spec)
    assert cost.kv_cache_bytes_per_sequence == oracle.cached_bytes(spec)
    a = cost.active_params
    assert a.with_embeddings == active.total()
    assert a.without_input_embedding == active.total() - active["embedding"]
    assert a.without_embeddings == active.total() - active["embedding"] - active["head"]


def listed(spec: ExperimentSpec) -> list[oracle.Tensor]:
    """All that is trained, tensor by tensor."""
    return [tensor for tensor in (*oracle.tensors(spec.model), *oracle.mtp_tensors(spec.model)) if "product" not in tensor.part]


def is_expert(tensor: oracle.Tensor, spec: ExperimentSpec) -> bool:
    """Whether it lies where its expert does: a bias of the layer does not."""
    return tensor.part == "experts" and not (spec.model.moe is not None and spec.model.moe.bias == "layer" and len(tensor.shape) == 1)


def is_router(tensor: oracle.Tensor, spec: ExperimentSpec) -> bool:
    chosen = spec.model.attention.kind == "gqa" and spec.model.attention.experts is not None
    return tensor.part == "routers" or (chosen and tensor.part == "attention" and tensor.shape == (1, spec.model.d_model))


@DRAWN
@given(specs())
def test_bytes_follow_from_the_parameters(spec: ExperimentSpec) -> None:
    cost, ranks, world = price(spec), spec.parallel.expert, spec.parallel.world_size
    size, cut = cost.bytes, spec.parallel.shard and spec.parallel.world_size > 1
    every = listed(spec)
    all_held, experts = sum(tensor.size for tensor in every), sum(tensor.size for tensor in every if is_expert(tensor, spec))
    whole = all_held - experts + experts // ranks
    if cut:  # more by the padding of rows, which tests/moe/parallel compare with what is allocated
        assert size.weights / 4 >= (all_held - experts) / world + experts / ranks
        assert size.weights / 4 <= whole + world * max(tensor.size for tensor in every)
    else:
        assert size.weights == 4 * whole
    assert size.optimizer == 2 * size.weights
    assert size.gradients == (4 * whole if cut and spec.training.grad_accumulation > 1 else size.weights)
    assert size.checkpoint == 12 * all_held
    most = 4 * (all_held if ranks == 1 else max(all_held - experts, experts // ranks if spec.parallel.data > 1 else 0))
    assert size.reduction <= min(most, 25 * 2**20)
    assert (size.reduction == 0) == (world == 1) or cut
    assert cut or world == 1 or size.reduction == min(most, 25 * 2**20)
    assert size.total_per_device == size.weights + size.gradients + size.optimizer + max(size.copies + size.activations, size.reduction)
    width = 2 if spec.training.precision == "bfloat16" else 4
    moe = spec.model.moe
    crossings = 0.0
    for stack in (range(spec.model.n_layers), range(spec.model.encoder_layers), [spec.model.n_layers - 1] * spec.model.mtp_depth):
        for layer in stack:
            if oracle.is_sparse(spec.model, layer):
                assert moe is not None
                crossings += (6 if spec.training.activation_recompute else 4) * moe.top_k * spec.model.d_model * width * (ranks - 1) / ranks
    assert cost.all_to_all_bytes_per_token == int(crossings)


@DRAWN
@given(specs())
def test_copies_are_of_the_matrices_that_products_take(spec: ExperimentSpec) -> None:
    plain = spec.model_dump()
    plain["parallel"]["shard"] = False
    copies = {}
    for precision in ("float32", "tf32", "bfloat16"):
        plain["training"]["precision"] = precision
        found = price(ExperimentSpec.model_validate(plain))
        copies[precision] = found.bytes.copies
        assert found.sharding_bytes_per_step == 0
    matrices = [
        tensor for tensor in (*oracle.tensors(spec.model), *oracle.mtp_tensors(spec.model)) if tensor.multiplied and not is_router(tensor, spec)
    ]
    experts = sum(tensor.size for tensor in matrices if tensor.part == "experts")
    rest = sum(tensor.size for tensor in matrices if tensor.part != "experts")
    assert copies == {"float32": 0, "tf32": 0, "bfloat16": 2 * (rest + -(-experts // spec.parallel.expert))}


@DRAWN
@given(specs())
def test_activations_shrink_with_ranks_and_recompute_and_never_below_the_logits(spec: ExperimentSpec) -> None:
    plain = spec.model_dump()
    plain["training"]["activation_recompute"] = False
    kept = price(ExperimentSpec.model_validate(plain)).bytes.activations
    plain["training"]["activation_recompute"] = True
    recomputed = price(ExperimentSpec.model_validate(plain)).bytes.activations
    logits = 8 * spec.model.vocab_size * spec.data.seq_len * spec.training.batch_size // spec.parallel.world_size
    assert logits * (1 + spec.model.mtp_depth) < recomputed
    if spec.model.n_layers > 1:
        assert recomputed < kept
    plain["training"]["grad_accumulation"] = 2
    if 4 % spec.parallel.world_size == 0:
        assert price(ExperimentSpec.model_validate(plain)).bytes.activations * 2 == recomputed


def test_latent_attention_caches_its_latent() -> None:
    spec = ExperimentSpec.model_validate({"model": {"n_layers": 3, "attention": {"kind": "mla", "kv_lora_rank": 64, "qk_rope_head_dim": 16}}})
    assert price(spec).kv_cache_bytes_per_token == 3 * 80 * 4
    grouped = {"model": {"n_layers": 3, "attention": {"kind": "gqa", "n_kv_heads": 2}}, "training": {"precision": "bfloat16"}}
    assert price(ExperimentSpec.model_validate(grouped)).kv_cache_bytes_per_token == 3 * 2 * 2 * 32 * 2


def test_the_table_names_every_part_and_figure() -> None:
    cost = price(ExperimentSpec())
    text = table(cost)
    assert f"{cost.total_params:,}" in text and f"{cost.flops_per_token.training:,}" in text
    assert "experts" in text and "dense ffn" not in text
    assert cost.model_dump()["active_params"]["without_embeddings"] == cost.active_params.without_embeddings


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (16 * 10**12, "16 TB"), (10**19, "10 EB"), (10**40, "1e+22 EB")]
)
def test_bytes_as_text(size: int, text: str) -> None:
    assert bytes_text(size) == text


# ----- limits


def refused(model: dict[str, object], **rest: object) -> list[tuple[str, str]]:
    spec = ExperimentSpec.model_validate({"model": model, **rest})
    started = time.perf_counter()
    found = check_size(spec, max_params=2e9)
    assert time.perf_counter() - started < 0.05
    return [(problem.pointer, problem.detail) for problem in found]


def test_a_trillion_parameters_are_refused_with_figure_and_limit() -> None:
    experts = {"n_experts": 4096, "top_k": 2, "d_expert": 10_000}
    [(pointer, detail)] = refused({"n_layers": 8, "d_model": 1024, "moe": experts})
    assert pointer == "/model/moe/n_experts"
    assert detail == "n_experts: 1.0e12 parameters (16.1 TB with gradients and optimiser) > limit 2.0e9"


@pytest.mark.parametrize(
    ("model", "pointer"),
    [
        ({"vocab_size": 10_000_000, "d_model": 1024}, "/model/vocab_size"),
        ({"moe": None, "d_ff": 1_048_576, "d_model": 1024}, "/model/d_ff"),
        ({"moe": None, "d_ff": 1, "d_model": 65_536}, "/model/d_model"),
        ({"d_model": 4096, "moe": {"n_shared": 256, "d_shared": 100_000}}, "/model/moe/n_shared"),
    ],
)
def test_too_many_parameters_are_blamed_on_the_largest_part(model: dict[str, object], pointer: str) -> None:
    assert [found for found, _ in refused(model)] == [pointer]


def test_a_million_tiny_layers_are_refused() -> None:
    found = dict(refused({"n_layers": 1_000_000, "d_model": 8, "attention": {"kind": "gqa", "n_heads": 1, "n_kv_heads": 1}, "moe": None, "d_ff": 1}))
    assert found == {"/model/n_layers": "n_layers: 1,000,000 layers > limit 1,000"}


def test_more_routing_counts_than_a_frame_holds_are_refused() -> None:
    found = dict(
        refused(
            {"n_layers": 20, "d_model": 8, "attention": {"kind": "gqa", "n_heads": 1, "n_kv_heads": 1}, "moe": {"n_experts": 8192, "d_expert": 1}}
        )
    )
    assert found["/model/moe/n_experts"] == "n_experts: 20 MoE layers x 8,192 experts = 163,840 token counts a step > limit 131,072"


def test_more_counts_of_attention_experts_than_a_frame_holds_are_refused() -> None:
    attention = {"kind": "gqa", "n_heads": 1, "n_kv_heads": 1, "experts": {"n_experts": 4096}}
    found = dict(refused({"n_layers": 40, "d_model": 8, "attention": attention, "moe": {"d_expert": 1}}))
    assert found["/model/attention/experts/n_experts"] == (
        "n_experts: 40 layers x 4,096 attention experts = 163,840 token counts a step > limit 131,072"
    )


def test_memory_of_a_device_is_a_limit_where_it_is_known() -> None:
    spec = ExperimentSpec.model_validate({"training": {"batch_size": 1_048_576}})
    assert check_size(spec, max_params=2e9) == []
    [problem] = check_size(spec, max_params=2e9, max_bytes_per_device=16 * 10**9)
    assert problem.pointer == "/training/batch_size" and "> limit 16 GB" in problem.detail


def test_what_fits_is_not_refused() -> None:
    assert check_size(ExperimentSpec(), max_params=2e9) == []
    exactly = price(ExperimentSpec()).total_params
    assert check_size(ExperimentSpec(), max_params=exactly) == []
    assert len(check_size(ExperimentSpec(), max_params=exactly - 1)) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 1_000_000),
    st.integers(0, 10_000),
    st.integers(8, 1_048_576).map(lambda d: d // 8 * 8),
    st.integers(1, 65_536),
    st.integers(1, 1_048_576),
    st.integers(1, 1_048_576),
)
def test_any_spec_is_priced_or_refused_at_once(layers: int, encoder: int, d: int, experts: int, width: int, batch: int) -> None:
    model = {"n_layers": layers, "encoder_layers": encoder, "d_model": d, "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 4}}
    model["moe"] = {"n_experts": experts, "top_k": 1, "d_expert": width}
    spec = ExperimentSpec.model_validate({"model": model, "training": {"batch_size": batch}})
    started = time.perf_counter()
    problems = check_size(spec, max_params=2e9)
    assert time.perf_counter() - started < 0.05
    assert bool(problems) == (price(spec).total_params > 2e9 or layers + encoder > 1000 or (layers + encoder) * experts > 131_072)
    for problem in problems:
        assert " > limit " in problem.detail and problem.pointer.rsplit("/", 1)[1] in problem.detail


def test_counts_as_text() -> None:
    assert count_text(10**12) == "1.0e12" and count_text(2e9) == "2.0e9" and count_text(0) == "0.0e0"
