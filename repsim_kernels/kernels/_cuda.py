"""Helpers shared by the Triton kernels and the CUDA kernels that CuPy launches."""

from __future__ import annotations

import torch
from torch import Tensor

# Most blocks along each axis of a grid, on every CUDA device since sm_30.
GRID_LIMITS = {"x": 2**31 - 1, "y": 65_535, "z": 65_535}


def check_grid(kernel: str, grid: tuple[int, ...]) -> None:
    """Raise ValueError for a grid that exceeds the limits of CUDA; an empty grid is valid."""
    for (axis, limit), blocks in zip(GRID_LIMITS.items(), grid, strict=False):
        if not 0 <= blocks <= limit:
            raise ValueError(f"{kernel}: {blocks} blocks along {axis}; expected 0 to {limit}")


def find_scale(x: Tensor) -> Tensor:
    """Return a power of two (float32, 0-d, on the device of x) that scales x to about 1.

    Squares and sums of float32 products then neither overflow nor underflow, and no digit is lost.
    """
    low, high = torch.aminmax(x)
    exponent = torch.frexp(torch.maximum(-low, high).to(torch.float32)).exponent
    return torch.exp2(-exponent.clamp(-126, 126).to(torch.float64)).to(torch.float32)
