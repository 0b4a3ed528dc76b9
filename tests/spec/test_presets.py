"""The published totals, to the last digit, and what the presets promise."""

from __future__ import annotations

import pytest

from spec import presets
from spec.accounting import check_size, price
from spec.trainable import problems

# Recomputed from the models' own configurations: total, active with both embeddings.
EXACT = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744),
    "dbrx": (131_596_523_520, 36_469_708_800),
    "grok-1": (315_684_820_992, 83_756_587_008),
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496),
    "deepseek-v2": (235_741_434_880, 21_375_800_320),
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),
    "deepseek-v3": (671_026_404_352, 37_552_282_624),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "llama-4-scout": (107_769_861_120, 17_172_894_720),
    "llama-4-maverick": (400_711_848_960, 17_184_691_200),
    "minicpm-moe-8x2b": (13_873_291_776, 4_318_142_976),
    "jetmoe-8b": (8_522_237_952, 2_331_445_248),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912),
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744),
    # The recomputed figure leaves out what the published table does not describe: 129 norms of 8192 and 32 x 128 relative positions.
    "glam-64b-64e": (1_161_755_099_136 + 129 * 8192 + 32 * 128, 96_603_209_728 + 129 * 8192 + 32 * 128),
    "minimax-text-01": (456_089_655_296, 48_403_306_496),
    # The recomputed figure has no norms: 92 of 1024.
    "gshard-600b": (619_366_318_080 + 92 * 1024, None),
    "switch-c": (1_571_375_798_688, None),
    "switch-xxl": (394_675_073_024, None),
    "st-moe-32b": (269_104_551_936, None),
}
# Totals that the source prints for something else than the parameters counted here.
OTHERWISE_COUNTED = {
    "grok-1": 314_879_514_624,  # without the embedding
    "llama-4-scout": 109_000_000_000,  # with the vision tower
    "minicpm-moe-8x2b": 14_000_000_000,
    "gshard-600b": 600_000_000_000,  # the paper rounds its models to one digit
}
FULL = [name for name in presets.names() if presets.describe(name).size == "full"]
# Of each system that the methods name: what trains here.
SYSTEMS = {
    *("shazeer", "gshard", "switch", "switch-xxl", "hash", "base", "s-base", "rl-r", "glam", "st-moe", "deepspeed-moe", "moduleformer", "jetmoe"),
    *("mixtral", "dbrx", "grok-1", "deepseek-moe", "deepseek-v2", "deepseek-v3", "qwen1.5-moe", "qwen3", "minicpm-moe", "olmoe", "minimax"),
    *("llama-4", "phi-3.5-moe", "gpt-oss", "expert-choice", "random", "all-experts", "dense", "collapse"),
}
NANO = [name for name in presets.names() if presets.describe(name).size == "nano"]


def test_every_full_size_preset_has_an_exact_total() -> None:
    assert set(FULL) == set(EXACT)


@pytest.mark.parametrize("name", FULL)
def test_total_and_active_are_exact(name: str) -> None:
    cost = price(presets.load(name))
    total, active = EXACT[name]
    assert cost.total_params == total
    if active is not None:
        assert cost.active_params.with_embeddings == active


@pytest.mark.parametrize(
    ("name", "convention", "active"),
    [
        ("deepseek-v3", "without_input_embedding", 36_625_603_584),
        ("deepseek-v2-lite", "without_input_embedding", 2_451_435_008),
        ("jetmoe-8b", "without_input_embedding", 2_265_909_248),
        ("gpt-oss-20b", "without_input_embedding", 3_608_307_264),
        ("gpt-oss-120b", "without_input_embedding", 5_132_849_472),
        ("minicpm-moe-8x2b", "without_embeddings", 4_035_320_064),
        ("minimax-text-01", "without_embeddings", 45_944_920_064),
    ],
)
def test_the_other_conventions_of_active_are_exact(name: str, convention: str, active: int) -> None:
    assert getattr(price(presets.load(name)).active_params, convention) == active


def test_the_block_that_predicts_further_ahead_is_exact_and_in_no_total() -> None:
    cost = price(presets.load("deepseek-v3"))
    assert cost.mtp_params == cost.by_part["mtp"] == 11_610_067_968
    assert cost.bytes.checkpoint == 12 * (cost.total_params + cost.mtp_params)


def printed(text: str) -> tuple[float, float]:
    """The lowest and highest figure that "46.7B" can stand for: some sources round down, and some up."""
    factor = {"B": 1e9, "T": 1e12}[text[-1]]
    digits = text[:-1]
    unit = 10.0 ** -len(digits.partition(".")[2])
    return (float(digits) - unit) * factor, (float(digits) + unit) * factor


@pytest.mark.parametrize("name", FULL)
def test_what_the_source_prints_is_what_is_counted(name: str) -> None:
    published, cost = presets.describe(name).published, price(presets.load(name))
    assert published is not None
    low, high = printed(published.total.removesuffix(" class"))
    assert low <= OTHERWISE_COUNTED.get(name, cost.total_params) <= high
    if name in OTHERWISE_COUNTED:
        assert published.difference
    if published.active is not None:
        assert published.active_convention is not None
        low, high = printed(published.active)
        assert low <= getattr(cost.active_params, published.active_convention) <= high


@pytest.mark.parametrize("name", FULL)
def test_full_size_is_described_with_its_source_and_is_too_large_to_run(name: str) -> None:
    about = presets.describe(name)
    assert about.title and about.about and about.source
    assert check_size(presets.load(name), max_params=2e9)


@pytest.mark.parametrize("name", NANO)
def test_nano_presets_can_be_trained_here(name: str) -> None:
    spec = presets.load(name)
    assert spec.name == name
    assert problems(spec) == [] and check_size(spec, max_params=2e7) == []
    assert spec.training.steps * spec.training.batch_size * spec.data.seq_len <= 300 * 8 * 256


def test_every_system_has_a_small_one() -> None:
    assert set(NANO) == {f"nano-{system}" for system in SYSTEMS}


@pytest.mark.parametrize("name", NANO)
def test_nano_presets_are_of_a_size(name: str) -> None:
    cost, about = price(presets.load(name)), presets.describe(name)
    assert about.title.startswith("Nano ") and about.about.endswith(".")
    assert 0.9e6 < cost.total_params < 7e6
    assert cost.flops_per_token.training < 13e6


def test_the_dense_baseline_costs_what_nano_mixtral_costs_beside_its_routers() -> None:
    sparse, dense = price(presets.load("nano-mixtral")), price(presets.load("nano-dense"))
    routers = 2 * sparse.by_part["routers"]
    assert sparse.flops_per_token.forward == dense.flops_per_token.forward + routers


def test_nano_presets_come_first_and_unknown_names_are_told() -> None:
    assert presets.names()[: len(NANO)] == sorted(NANO)
    with pytest.raises(presets.UnknownPresetError, match="did you mean 'nano-mixtral'"):
        presets.load("nano-mistral")
    for name in ("", "../presets/nano-dense", "nano-dense.yaml", "/etc/passwd"):
        with pytest.raises(presets.UnknownPresetError, match="no preset"):
            presets.load(name)
