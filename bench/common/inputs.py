"""What benchmarks are run on, and what their results are held to."""

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
# AlexNet's first layer and a class's images, ResNet50's last stage and those of ten.
SHAPES = ((50, 193_600), (500, 100_352))
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

Make = Callable[[Generator], tuple[Tensor, ...]]


def activations(g: Generator, n: int, p: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rectified activations of n stimuli with 10 directions in common, (n, p)."""
    shared, neurons = (
        torch.randn(shape, generator=g, device=g.device) for shape in ((n, 10), (10, p))
    )
    x = torch.randn(n, p, generator=g, device=g.device)
    return x.addmm_(shared, neurons, alpha=1 / 3).relu_().to(dtype)


def one(n: int, p: int, dtype: torch.dtype) -> Make:
    return lambda g: (activations(g, n, p, dtype),)


def pair(n: int, p: int, dtype: torch.dtype) -> Make:
    """Two layers with half of their variance in common."""

    def make(g: Generator) -> tuple[Tensor, ...]:
        x = activations(g, n, p)
        return x.to(dtype), (x.roll(1, 1) + activations(g, n, p)).to(dtype)

    return make


def cells(p: int, n_cells: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.arange(p) % n_cells)


def size(n: int, p: int, dtype: torch.dtype) -> int:
    return n * p * dtype.itemsize


def products(operation: str, dtype: torch.dtype) -> str:
    """How an operation multiplies Grams by default: the name of a ceiling."""
    kernels = DEVICE == "cuda" and dtype != torch.float64 and (operation, "triton") in KERNELS
    return "tf32x3" if kernels else "float64"


def as_grams(operation: str, dtype: torch.dtype) -> Callable[[Any, Any], None]:
    return partial(assert_gram_close, tol=GRAM[products(operation, dtype)])


def as_distances(operation: str, dtype: torch.dtype) -> Callable[[Any, Any], None]:
    exact = products(operation, dtype) == "float64"
    return partial(assert_close, tol=DISTANCE["float64" if exact else "float32"])


def exact(operation: str, x: Tensor) -> Any:
    """What the definition of an operation takes: float64, but for RSA.

    There the precision of the input decides which distances tie.
    """
    return x.cpu() if operation == "rsa" else x.double().cpu().numpy()


def reference(operation: str, **options: Any) -> Callable[..., Any]:
    """The definition in NumPy float64, of the same rounded arrays."""

    def call(*arrays: Tensor) -> Any:
        given = (exact(operation, a) for a in arrays)
        return getattr(rk, operation)(*given, **options, backend="reference")

    return call
