"""One row of the sheet, and what rows have in common: sizes, inputs, tolerances."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

Call = Callable[..., Tensor]
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]

# Relative Frobenius errors that pass. Three TF32 products hold float32's digits, one holds 10 bits;
# sums in float32 are of bounded length, so that they add nothing to float32's rounding.
PRODUCTS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3}
MEANS = 1e-12  # sums in float64
DISTANCES = 1e-4  # what the rounding of the Grams does to a distance
EXACT = 0.0  # copies and masks round nothing


@dataclass(frozen=True)
class Case:
    """A kernel at one shape, its float64 reference, and other ways to the same numbers.

    ``kernel``, ``reference`` and ``routes`` take what ``inputs`` makes, and give one tensor.
    """

    name: str
    shape: str
    dtype: torch.dtype
    precision: str  # of the products, a ceiling's name; "ieee" also where there are none
    tolerance: float
    bytes: int  # the least that goes to and from memory
    operations: int
    inputs: Inputs
    kernel: Call
    reference: Call
    # "backend": what the package does without kernels; "plain": PyTorch's float32; "cupy": CuPy's.
    routes: dict[str, Call]
    parts: int = 1  # of the result, whose errors are told apart so that a small one can't hide


@dataclass(frozen=True)
class Shape:
    n: int
    p: int
    cells: int
    dtype: torch.dtype
    precision: str = "tf32x3"

    @property
    def size(self) -> int:
        """Bytes of the activations."""
        return self.n * self.p * self.dtype.itemsize

    def activations(self, g: torch.Generator) -> tuple[Tensor, ...]:
        """Random (n, p), neuron-major as the package holds them, each neuron with a mean."""
        x = torch.randn(self.p, self.n, generator=g, device=g.device)
        x += torch.randn(self.p, 1, generator=g, device=g.device)
        return (x.to(self.dtype).mT,)


def function(path: str) -> Call:
    """A function of repsim_kernels.kernels, imported when a row needs it."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"repsim_kernels.kernels.{module}"), name)


def labelled(s: Shape, partition: int = 0) -> np.ndarray:
    return np.random.default_rng(partition).permutation(np.arange(s.p) % s.cells)


@cache
def members(s: Shape, partition: int, device: torch.device) -> list[Tensor]:
    """The neurons of each cell, on the device beforehand: plain routes pay nothing for them."""
    labels = labelled(s, partition)
    return [torch.from_numpy(np.flatnonzero(labels == c)).to(device) for c in range(s.cells)]
