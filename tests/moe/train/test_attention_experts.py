"""A run whose attention projections are experts tells which of them its tokens went to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe.train.telemetry import max_vio
from spec import events
from tests.moe.train.tiny import Run, tiny


def test_counts_of_every_layer_and_figures(tmp_path: Path) -> None:
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "experts": {"n_experts": 3, "top_k": 2}}
    model = tiny().model_dump()["model"] | {"attention": attention, "mtp_depth": 1}
    model["moe"] |= {"every": 2}
    run = Run(tiny(model=model, training={"steps": 3, "batch_size": 4, "grad_accumulation": 2}), tmp_path)
    run.go()
    names = [event.names for event in run.events if isinstance(event, events.MetricsDeclared)][-1]
    for step in run.steps().values():
        counts_LE = np.asarray(step.tensors["attention_tokens"])
        assert counts_LE.dtype == np.uint32 and counts_LE.sum(1).tolist() == [256, 256, 248]  # 4 sequences of 32; the last predicts one ahead
        assert np.asarray(step.tensors["expert_tokens"]).shape == (2, 4)
        scalars = dict(zip(names, step.scalars.tolist(), strict=False))
        assert scalars["router/moa_max_vio"] == pytest.approx(max_vio(counts_LE).mean(), rel=1e-6)
        assert scalars["router/moa_dead_experts"] == np.count_nonzero(counts_LE == 0)
        assert 0 < scalars["router/moa_entropy"] <= np.log(3) + 1e-6
        parts = scalars["lm_loss"] + scalars["balance/switch_aux"] + scalars["balance/z_loss"] + scalars["router/moa_balance"]
        assert scalars["loss"] == pytest.approx(parts + model["mtp_weight"] * scalars["mtp_loss"], rel=1e-5)
