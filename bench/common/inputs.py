"""The inputs of the benchmarks, and the checks of their results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, GRAM, assert_close, assert_gram_close
from repsim_kernels._dispatch import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# AlexNet's first layer for one class's images, and ResNet50's last stage for ten classes' images.
SHAPES = ((50, 193_600), (500, 100_352))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

Make = Callable[[Generator], tuple[Tensor, ...]]


def draw_activations(g: Generator, n: int, p: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw rectified activations (n, p) that share 10 directions."""
    shared, neurons = (
        torch.randn(shape, generator=g, device=g.device) for shape in ((n, 10), (10, p))
    )
    x = torch.randn(n, p, generator=g, device=g.device)
    return x.addmm_(shared, neurons, alpha=1 / 3).relu_().to(dtype)


def make_one(n: int, p: int, dtype: torch.dtype) -> Make:
    return lambda g: (draw_activations(g, n, p, dtype),)


def make_pair(n: int, p: int, dtype: torch.dtype) -> Make:
    """Return a function that draws two layers that share half of their variance."""

    def make(g: Generator) -> tuple[Tensor, ...]:
        x = draw_activations(g, n, p)
        return x.to(dtype), (x.roll(1, 1) + draw_activations(g, n, p)).to(dtype)

    return make


def assign_cells(p: int, n_cells: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(p) % n_cells)


def count_bytes(n: int, p: int, dtype: torch.dtype) -> int:
    return n * p * dtype.itemsize


def get_precision(operation: str, dtype: torch.dtype) -> str:
    """Return the default precision of an operation's Gram products, which names a ceiling."""
    kernels = DEVICE == "cuda" and dtype != torch.float64 and (operation, "triton") in KERNELS
    return "tf32x3" if kernels else "float64"


def get_cka_precision(dtype: torch.dtype, kernel: str = "linear") -> str:
    """Return the precision of the products of `cka` by default, which names a ceiling."""
    return "ieee" if kernel == "linear" and dtype != torch.float64 else "float64"


def check_grams(operation: str, dtype: torch.dtype) -> Callable[[Any, Any], None]:
    return partial(assert_gram_close, tol=GRAM[get_precision(operation, dtype)])


def check_distances(operation: str, dtype: torch.dtype) -> Callable[[Any, Any], None]:
    exact = get_precision(operation, dtype) == "float64"
    return partial(assert_close, tol=DISTANCE["float64" if exact else "float32"])


def convert_exactly(operation: str, x: Tensor) -> Any:
    """Convert an input for an operation's definition: to float64, except for RSA.

    In RSA the precision of the input decides which distances tie.
    """
    return x.cpu() if operation == "rsa" else x.double().cpu().numpy()


def make_reference(operation: str, **options: Any) -> Callable[..., Any]:
    """Return the definition in NumPy float64, applied to the same rounded arrays."""

    def call(*arrays: Tensor) -> Any:
        converted = (convert_exactly(operation, a) for a in arrays)
        return getattr(rk, operation)(*converted, **options, backend="reference")

    return call
