"""Inputs that show wrong addresses: NaN for neighbours in memory, and places beyond 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 4096


def guarded(x: Tensor) -> Tensor:
    """The same numbers and strides in a larger piece of memory that is NaN everywhere else."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.full((extent + 2 * _MARGIN,), torch.nan, dtype=x.dtype, device=x.device)
    view = memory.as_strided(x.shape, x.stride(), _MARGIN)
    view.copy_(x)
    return view


def far_apart(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """float16 values with strides of up to 2^30 elements, of which only their own are touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(2**32 + 16, dtype=torch.float16, device=values.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    view = memory.as_strided(values.shape, strides)
    view.copy_(values)
    return view
