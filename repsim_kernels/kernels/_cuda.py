"""What the Triton kernels and those started by CuPy share."""

from __future__ import annotations

import torch
from torch import Tensor

# The most blocks that CUDA takes along each axis of a grid, on every device since sm_30.
GRID_LIMITS = {"x": 2**31 - 1, "y": 65_535, "z": 65_535}


def check_grid(kernel: str, grid: tuple[int, ...]) -> None:
    """Raise ValueError for a grid that no CUDA device takes; one with no blocks is left alone."""
    for (axis, most), blocks in zip(GRID_LIMITS.items(), grid, strict=False):
        if not 0 <= blocks <= most:
            raise ValueError(f"{kernel}: {blocks} blocks along {axis}; expected 0 to {most}")


def scale(x: Tensor) -> Tensor:
    """A power of two (float32, 0-d, on x's device) that brings x to a magnitude of about 1.

    Squares and sums of float32 products then neither overflow nor vanish, and no digit is lost.
    """
    low, high = torch.aminmax(x)
    exponent = torch.frexp(torch.maximum(-low, high).to(torch.float32)).exponent
    return torch.exp2(-exponent.clamp(-126, 126).to(torch.float64)).to(torch.float32)
