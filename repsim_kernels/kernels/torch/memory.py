"""Buffers of the torch kernels: how they are allocated, and how large a block should be."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Bytes below which PyTorch's own allocation is as fast as any.
_SMALL = 2**18
# Elements of a float64 block of neurons: 16 MiB, which stays in a last-level cache.
BLOCK = 2**21


def empty_buffer(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate uninitialised memory on the device of x, with its dtype by default.

    On a CPU, NumPy allocates it: its memory comes in huge pages, which makes it ten times as fast.
    """
    dtype = dtype or x.dtype
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL or x.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=x.device)
    memory = np.empty(size, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
