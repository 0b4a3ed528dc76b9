"""What the run page expects to cross between ranks: the accountant's figure, or nothing."""

from __future__ import annotations

from experiments.pages.traffic import expected_traffic, sample_steps
from spec.experiment import ExperimentSpec


def test_a_row_goes_out_and_back_forward_and_backward() -> None:
    spec = ExperimentSpec.model_validate({"parallel": {"expert": 2}, "model": {"d_model": 64, "n_layers": 3}})
    found = expected_traffic(spec.model_dump())
    assert found["row_bytes"] == 4 * 4 * 64
    rows = 3 * 2 * spec.training.batch_size * spec.data.seq_len  # layers, copies, tokens
    assert found["step_bytes"] == rows // 2 * found["row_bytes"]


def test_nothing_is_expected_where_experts_are_not_shared_out_or_nobody_knows() -> None:
    assert expected_traffic({}) == expected_traffic({"model": {"moe": None}}) == expected_traffic({"x": 1}) == {"row_bytes": 0, "step_bytes": 0}


def test_never_sampled_is_not_the_same_as_nobody_knows() -> None:
    assert [sample_steps({"telemetry": {"phases_every": 7, "every": 5}}), sample_steps({"telemetry": {"phases_every": 0}})] == [10, 0]
    assert sample_steps({}) is sample_steps({"a field of another version": 1}) is None
