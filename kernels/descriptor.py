"""Tensor descriptors: what Hopper's copy engine (TMA) needs to know of a tensor to move tiles of it without the threads' help.

They are made on the host and go to the kernel by value, so that a captured CUDA graph holds them and no scratch memory is allocated.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROUNDS = "round_f32_to_tf32" in inspect.signature(TensorDescriptor).parameters


def descriptor(t: Tensor, block: list[int], *, precision: str | None = None) -> TensorDescriptor | None:
    """Of tiles of `block` elements of `t`; None where the device has no such engine, or `t` is not laid out as it wants.

    That is: the last dimension contiguous, start and other strides multiples of 16 bytes, nothing empty. Beyond `t` tiles hold zeros.
    float32 that is loaded for products in "tf32" is rounded to it, where the matrix units would cut it off; for "tf32x3" it is left whole. Triton
    before 3.7 cannot ask for that: None.
    """
    to_round = t.dtype == torch.float32 and precision == "tf32"
    if to_round and not ROUNDS:
        return None
    if t.is_cuda and torch.cuda.get_device_capability(t.device)[0] < 9:
        return None
    strides_bytes = [stride * t.element_size() for stride in t.stride()[:-1]]
    if t.stride(-1) != 1 or t.numel() == 0 or t.data_ptr() % 16 or any(stride % 16 or stride == 0 for stride in strides_bytes):
        return None
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block, **({"round_f32_to_tf32": True} if to_round else {}))


def weight_descriptor(w_EBA: Tensor, block_outer: int, block_inner: int, *, precision: str | None = None) -> TensorDescriptor | None:
    """Of an expert's tiles of weights, whichever of the two inner dimensions is contiguous; see `grouped_gemm_triton.weight_tile`."""
    if w_EBA.stride(2) == 1:
        return descriptor(w_EBA, [1, block_outer, block_inner], precision=precision)
    return descriptor(w_EBA.transpose(1, 2), [1, block_inner, block_outer], precision=precision)
