"""Inputs that reveal wrong addresses: surrounded by NaN, or with offsets beyond 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

_MARGIN = 4096


def pad_with_nan(x: Tensor) -> Tensor:
    """Copy x, with its strides, into a larger allocation filled with NaN."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.full((extent + 2 * _MARGIN,), torch.nan, dtype=x.dtype, device=x.device)
    view = memory.as_strided(x.shape, x.stride(), _MARGIN)
    view.copy_(x)
    return view


def spread_in_memory(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Copy values to float16 with strides of up to 2^30 elements; no other memory is touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(2**32 + 16, dtype=torch.float16, device=values.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    view = memory.as_strided(values.shape, strides)
    view.copy_(values)
    return view
