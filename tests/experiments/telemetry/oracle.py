"""What the store must answer, computed with loops and float64 from the steps themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spec.events import TENSORS, StepDone


def bucket(step: int, level: int) -> int:
    return max(step - 1, 0) // level


def rows(steps: Mapping[int, StepDone], names: list[str], order: list[str], level: int, low: int, high: int) -> list[dict[str, Any]]:
    """One dict per row at `level` whose bucket meets low … high: last step, n, min, max, mean of each name, sums or means of tensors."""
    first, last = bucket(low, level), bucket(high, level)
    out = []
    for b in range(first, last + 1):
        if level == 1:
            inside = [b + 1] if b + 1 in steps and low <= b + 1 <= high else []
        else:
            inside = [s for s in sorted(steps) if bucket(s, level) == b]
        if not inside:
            continue
        row: dict[str, Any] = {"step": inside[-1], "n": len(inside)}
        for name in names:
            values = [float(steps[s].scalars[order.index(name)]) for s in inside]
            known = [value for value in values if not np.isnan(value)]
            row[name] = (min(known), max(known), sum(known) / len(known)) if known else (np.nan,) * 3
        for kind in TENSORS:
            arrays = [steps[s].tensors[kind] for s in inside if kind in steps[s].tensors]
            if arrays:
                total = sum(array.astype(np.float64) for array in arrays)
                row[kind] = total if TENSORS[kind].reduce == "sum" else total / len(arrays)
        out.append(row)
    return out


def check(header: dict[str, Any], arrays: Mapping[str, Any], expected: list[dict[str, Any]], layer: int | None = None) -> None:
    """The block holds exactly the `expected` rows."""
    assert arrays["step"].tolist() == [row["step"] for row in expected]
    assert arrays["n"].tolist() == [row["n"] for row in expected]
    assert header["total"] == sum(row["n"] for row in expected)
    for column, name in enumerate(header["names"]):
        for part, key in enumerate(("scalars_min", "scalars_max", "scalars_mean") if header["level"] > 1 else ("scalars",)):
            want = np.array([row[name][part] for row in expected])
            np.testing.assert_allclose(arrays[key][:, column], want, rtol=1e-5, atol=1e-6)
    for kind in TENSORS:
        if kind not in arrays:
            continue
        for i, row in enumerate(expected):
            if kind in row:
                want = row[kind] if layer is None or TENSORS[kind].axes[0] != "layer" else row[kind][layer : layer + 1]
                np.testing.assert_allclose(arrays[kind][i], want, rtol=1e-5 if TENSORS[kind].reduce == "mean" else 0)
