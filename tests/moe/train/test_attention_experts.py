"""A run whose attention projections are experts tells which of them its tokens went to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.moe.train.tiny import Run, tiny


def test_counts_of_every_layer_and_figures(tmp_path: Path) -> None:
    attention = {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "experts": {"n_experts": 3, "top_k": 2}}
    model = tiny().model_dump()["model"] | {"attention": attention, "mtp_depth": 1}
    model["moe"] |= {"every": 2}
    run = Run(tiny(model=model, training={"steps": 3, "batch_size": 4, "grad_accumulation": 2}), tmp_path)
    run.go()
    for step in run.steps().values():
        counts_LE = np.asarray(step.tensors["attention_tokens"])
        assert counts_LE.dtype == np.uint32 and counts_LE.sum(1).tolist() == [256, 256, 248]  # 4 sequences of 32; the last predicts one ahead
        assert np.asarray(step.tensors["expert_tokens"]).shape == (2, 4)
