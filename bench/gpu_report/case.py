"""A row of the report: a kernel at one shape, its float64 result, and other ways to that result."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[..., Tensor]
Facts = dict[str, Any]
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]
# formula(xp, dtype, *arrays) computes in a dtype, by its name, with the functions that torch, NumPy
# and CuPy share: one text is the reference, plain PyTorch and plain CuPy.
Formula = Callable[..., Any]

# Relative Frobenius errors that pass. Three TF32 products hold float32's digits, one holds 10 bits;
# sums in float32 are of bounded length, so that they add nothing to float32's rounding.
PRODUCTS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3}


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
    parts: int = 1  # of the result, each with an error of its own, so that a small one can't hide


@dataclass(frozen=True)
class Shape:
    """Activations of n stimuli and p neurons in a number of cells, and how they are multiplied."""

    n: int
    p: int
    cells: int
    dtype: torch.dtype = torch.float32
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

    def labels(self, partition: int = 0) -> np.ndarray:
        """The cell of each neuron (p,), at random, all cells of one size."""
        return np.random.default_rng(partition).permutation(np.arange(self.p) % self.cells)


@dataclass(frozen=True)
class PlainCupy:
    """A formula as a route by CuPy: tensors in and out by DLPack, on torch's stream."""

    formula: Formula

    def __call__(self, *inputs: Tensor) -> Tensor:
        import cupy  # type: ignore[import-not-found]

        device = inputs[0].device
        with (
            cupy.cuda.Device(device.index),
            cupy.cuda.Stream.from_external(torch.cuda.current_stream(device)),
        ):
            arrays = map(cupy.from_dlpack, inputs)
            return torch.utils.dlpack.from_dlpack(self.formula(cupy, "float32", *arrays))


def make_case(
    name: str,
    s: Shape,
    formula: Formula,
    cost: tuple[int, int],
    kernel: Call,
    backend: Call | None = None,
    detail: str = "",
    plain: str = "float32",
    cupy: bool = True,
    **facts: Any,
) -> Case:
    """A row whose reference and plain routes are one formula.

    ``cost``: bytes and operations. ``facts``: other fields of the Case than those that s decides.
    """
    defaults: Facts = {
        "precision": s.precision,
        "tolerance": PRODUCTS[s.precision],
        "inputs": s.activations,
        "reference": partial(formula, torch, "float64"),
    }
    routes: dict[str, Call] = {} if backend is None else {"backend": backend}
    routes["plain"] = partial(formula, torch, plain)
    routes |= {"cupy": PlainCupy(formula)} if cupy else {}
    shape, (moved, operations) = f"n={s.n} p={s.p:,}{detail}", cost
    facts = {**defaults, **facts, "bytes": moved, "operations": operations}
    return Case(name, shape, s.dtype, kernel=kernel, routes=routes, **facts)


def cast(xp: Any, dtype: str, *arrays: Any) -> list[Any]:
    """The arrays in a dtype, by its name; those that have it are not copied."""
    return [xp.asarray(a, dtype=getattr(xp, dtype)) for a in arrays]


def load(path: str, **options: Any) -> Callable[..., Any]:
    """A function of repsim_kernels.kernels, "module:name", imported when a row calls it."""
    module, _, name = path.partition(":")

    def call(*arguments: Any, **more: Any) -> Any:
        loaded = getattr(importlib.import_module(f"repsim_kernels.kernels.{module}"), name)
        return loaded(*arguments, **options, **more)

    return call
