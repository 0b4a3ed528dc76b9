"""What the run page must know of a run's ranks: the traffic that the accountant predicts, to set beside what was counted; when steps are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from spec.accounting import price
from spec.experiment import ExperimentSpec


def expected_traffic(spec: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that one sent row is in a step (out and back, forward and backward), and bytes that are to cross in a step.

    0 where experts are not shared out, or nobody knows.
    """
    try:
        described = ExperimentSpec.model_validate(spec)
    except ValidationError:
        return {"row_bytes": 0, "step_bytes": 0}
    if described.parallel.expert == 1 or described.model.moe is None:
        return {"row_bytes": 0, "step_bytes": 0}
    passes = 6 if described.training.activation_recompute else 4
    cost = price(described)
    return {
        "row_bytes": passes * described.training.product_bytes * described.model.d_model,
        "step_bytes": cost.all_to_all_bytes_per_token * cost.tokens_per_step,
    }


def sample_steps(spec: Mapping[str, Any]) -> int | None:
    """Steps between those whose parts are timed; 0 where none is, None where nobody knows: a recorded run's, or one of an older language."""
    try:
        return ExperimentSpec.model_validate(spec).telemetry.sample_steps if spec else None
    except ValidationError:
        return None
