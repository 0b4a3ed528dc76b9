"""What crosses between the ranks that share a run's experts, as the accountant predicts it: the run page sets it beside what was counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from spec.accounting import price
from spec.experiment import ExperimentSpec

PASSES = 4
"""Of each row that is sent: out and back, forward and backward."""


def expected_traffic(spec: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that one sent row is in a step, and bytes that are to cross in a step; 0 where experts are not shared out, or nobody knows."""
    try:
        described = ExperimentSpec.model_validate(spec)
    except ValidationError:
        return {"row_bytes": 0, "step_bytes": 0}
    if described.parallel.expert == 1 or described.model.moe is None:
        return {"row_bytes": 0, "step_bytes": 0}
    cost = price(described)
    return {
        "row_bytes": PASSES * described.training.product_bytes * described.model.d_model,
        "step_bytes": cost.all_to_all_bytes_per_token * cost.tokens_per_step,
    }
