"""What a device can do at best, for model FLOP utilisation: TFLOP/s of dense matrix products.

Sources: NVIDIA's data sheets of A100 (80 GB), H100 (SXM, PCIe, NVL), H200, HGX B200, GB200 NVL72, L4, L40S and A10, and its architecture papers
for the RTX cards (GA102, appendix A; Ada; Blackwell), with float32 accumulation. Where a sheet gives the figure with 2:4 sparsity, half of it
stands here. Clocks are the sheet's boost clocks: a device that is held below them shows less.

float32 means products that are as exact as IEEE float32, which a run makes in two ways: torch's on the plain cores, and Triton's experts as three
products of tf32 parts on the matrix units ("tf32x3", kernels/experts_triton.py). Its peak is the better of the two, the plain cores' figure
or a third of tf32's, which no mixture of kernels that run one after the other exceeds. So the MFU of a float32 run on H100 is that of 165
TFLOP/s, of which its dense layers, on the plain cores, reach 67 at most.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TF32_PRODUCTS = 3  # that make one of float32


class Peak(NamedTuple):
    """Dense TFLOP/s by the precision of the products, in the words of training.precision; `plain` is IEEE float32 on the plain cores."""

    bfloat16: float
    tf32: float
    plain: float

    @property
    def float32(self) -> float:
        """The better way to float32: the plain cores, or three tf32 products for one."""
        return max(self.plain, self.tf32 / TF32_PRODUCTS)


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
