"""Launching kernels: which tensors a device supports, the launch itself, and lower bounds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels._cuda import check_grid as check_grid
from repsim_kernels.kernels._cuda import find_scale as find_scale

PRECISIONS = ("tf32x3", "tf32", "ieee")


@dataclass(frozen=True)
class Floor:
    """Lower bound on a kernel's work: bytes to and from device memory, and operations."""

    bytes: int
    operations: int
    precision: str = "ieee"  # of the products; also "ieee" for a kernel without products


def name_products(precision: str, itemsize: int) -> str:
    """Name the rate of the products of operands for a precision and the bytes of a value of x.

    Operands are halves of float16, two for float32 values in "tf32x3", which makes three products.
    """
    if precision == "ieee":
        return "ieee"
    return "float16x3" if precision == "tf32x3" and itemsize == 4 else "float16"


@dataclass(frozen=True)
class CompileCase:
    """A launcher call at one of the study's shapes; tests/compile compiles the kernels it starts.

    ``call`` receives the device and may leave its tensors uninitialised, since nothing runs.
    ``products`` tells whether the kernel must use tensor cores. ``archs`` lists the targets: 90 is
    sm_90.
    """

    name: str
    call: Callable[[torch.device], Any]
    floor: Floor
    products: bool = False
    archs: tuple[int, ...] = (80, 90, 100)


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors; fixed at their import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def parse_release(version: str) -> tuple[int, ...]:
    """Parse the first two numbers of a version string."""
    return tuple(map(int, version.split(".")[:2]))


def interpreter_unsupported() -> str | None:
    """Return why the installed Triton's interpreter can't run the kernels, or None if it can.

    For the bounds of a loop, Triton before 3.7 converts arrays of one element to Python integers,
    which NumPy rejects since 2.4.
    """
    import triton

    if parse_release(triton.__version__) >= (3, 7) or parse_release(np.__version__) < (2, 4):
        return None
    return (
        f"Triton {triton.__version__}'s interpreter fails with NumPy {np.__version__}; "
        "expected Triton >= 3.7 or NumPy < 2.4"
    )


def unsupported(*tensors: Tensor) -> str | None:
    """Return why no kernel can take these tensors, or None if one can."""
    if is_interpreted() and (reason := interpreter_unsupported()) is not None:
        return reason
    for t in tensors:
        if t.device.type == "cpu" and not is_interpreted():
            return "it needs CUDA tensors (or TRITON_INTERPRET=1, which is for tests)"
        if t.device.type not in ("cpu", "cuda"):
            return f"it needs CUDA tensors, not {t.device.type}"
        if t.device.type == "cuda" and capability(t.device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer"
        if t.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32, not {str(t.dtype)[6:]}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability that launch settings are chosen for; 9.0 on a CPU."""
    return (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first tensor; the compilation tests replace this.

    Raises ValueError for a grid beyond CUDA's limits, also in the interpreter, which has none.
    An empty grid starts nothing.
    """
    check_grid(kernel.fn.__name__, grid)
    if 0 in grid:
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)
