"""What a device can do at best, for model FLOP utilisation: TFLOP/s of dense matrix products.

Source: NVIDIA's data sheets and architecture papers (A100, H100, H200, HGX B200, GB200 NVL72, L4, L40S, A10; GA102, AD102 and Blackwell papers
for the RTX cards, with float32 accumulation). Where a sheet gives the figure with 2:4 sparsity, half of it stands here. float32 is
that of the plain cores, IEEE. Clocks are the sheet's boost clocks: a device that is held below them shows less.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense TFLOP/s by the precision of the products, in the words of training.precision."""

    bfloat16: float
    tf32: float
    float32: float


# By the words of the name that the driver gives; the first that has all of them counts.
PEAKS: dict[tuple[str, ...], Peak] = {
    ("A100",): Peak(312, 156, 19.5),
    ("H100", "PCIe"): Peak(756, 378, 51),
    ("H100", "NVL"): Peak(835, 417, 60),
    ("H100",): Peak(989, 494, 67),
    ("H200", "NVL"): Peak(835, 417, 60),
    ("H200",): Peak(989, 494, 67),
    ("GH200",): Peak(989, 494, 67),
    ("B200",): Peak(2250, 1125, 75),
    ("GB200",): Peak(2500, 1250, 80),
    ("L4",): Peak(121, 60, 30.3),
    ("L40S",): Peak(362, 183, 91.6),
    ("A10",): Peak(125, 62.5, 31.2),
    ("RTX", "3090"): Peak(71, 35.6, 35.6),
    ("RTX", "4090"): Peak(165.2, 82.6, 82.6),
    ("RTX", "5090"): Peak(209.5, 104.8, 104.8),
}
_OTHER = {"Laptop", "MIG", "D", "Ti", "Max"}  # words of devices that share a name with a larger one


def peak_flop_per_s(device: str, precision: str) -> float | None:
    """The dense peak of the device that the driver calls `device`, for products in `precision`; None where it is not known."""
    words = set(re.split(r"[\s\-]+", device))
    if words & _OTHER:
        return None
    found = next((peak for name, peak in PEAKS.items() if words.issuperset(name)), None)
    figure: float | None = getattr(found, precision, None)
    return None if figure is None else figure * 1e12
