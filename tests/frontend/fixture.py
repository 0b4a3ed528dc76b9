"""The `steps` blocks that the TypeScript tests decode: `python -m tests.frontend.fixture` writes them anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spec import block

DIRECTORY = Path(__file__).parents[2] / "frontend" / "test" / "fixture"
HEADER = {"type": "steps", "run": 7, "names": ["loss", "max_vio"], "moe_layers": [1, 3], "n_experts": 4, "top_k": 2}


def blocks() -> dict[str, bytes]:
    """By file name: three steps as they are, and the same three as one row of 64."""
    step = np.array([1, 2, 3], np.uint32)
    loss = np.array([[4.0, 0.5], [3.0, np.nan], [2.0, 1.5]], np.float32)
    tokens = np.arange(24, dtype=np.uint32).reshape(3, 2, 4)
    fine = block.encode(
        {**HEADER, "level": 1, "from": 1, "to": 3, "total": 3},
        {"step": step, "n": np.ones(3, np.uint32), "scalars": loss, "expert_tokens": tokens},
    )
    coarse = block.encode(
        {**HEADER, "level": 64, "from": 1, "to": 64, "total": 1},
        {
            "step": np.array([3], np.uint32),
            "n": np.array([3], np.uint32),
            "scalars_min": np.array([[2.0, 0.5]], np.float32),
            "scalars_max": np.array([[4.0, 1.5]], np.float32),
            "scalars_mean": np.array([[3.0, 1.0]], np.float32),
            "expert_tokens": tokens.sum(0, keepdims=True).astype(np.float64),
        },
    )
    return {"steps.bin": fine, "rollup.bin": coarse}


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, data in blocks().items():
        (DIRECTORY / name).write_bytes(data)
