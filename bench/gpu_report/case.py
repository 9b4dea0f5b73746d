"""The definition of a row of the report: a kernel, its float64 reference, and other routes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels.kernels.triton import _launch

Call = Callable[..., Tensor]
Facts = dict[str, Any]
Inputs = Callable[[torch.Generator], tuple[Tensor, ...]]
# formula(xp, dtype, *arrays) computes in the named dtype with functions that torch, NumPy and CuPy
# share, so that one text is the reference, plain PyTorch and plain CuPy.
Formula = Callable[..., Any]

# Tolerated relative Frobenius errors. Three products of halves keep float32's digits, one keeps 10
# or 11 bits; sums in float32 have bounded length, so they don't add to its rounding error.
PRODUCTS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 1e-3}


@dataclass(frozen=True)
class KernelCase:
    """A kernel at one shape, its float64 reference, and other routes to the same result.

    ``kernel``, ``reference`` and ``routes`` take the tensors from ``inputs`` and return one tensor.
    """

    name: str
    shape: str
    dtype: torch.dtype
    precision: str  # of the products, the name of a ceiling; "ieee" if there are no products
    tolerance: float
    bytes: int  # minimum memory traffic
    operations: int
    inputs: Inputs
    kernel: Call
    reference: Call
    # "backend": the package's torch backend; "plain": PyTorch in float32; "cupy": plain CuPy.
    routes: dict[str, Call]
    parts: int = 1  # of the result; errors are computed per part, so small parts count too


@dataclass(frozen=True)
class Shape:
    """Activations of n stimuli and p neurons in cells, and the precision of products."""

    n: int
    p: int
    cells: int
    dtype: torch.dtype = torch.float32
    precision: str = "tf32x3"

    @property
    def size(self) -> int:
        """Size of the activations in bytes."""
        return self.n * self.p * self.dtype.itemsize

    @property
    def ceiling(self) -> str:
        """Name of the ceiling of products of operands."""
        return _launch.name_products(self.precision, self.dtype.itemsize)

    def activations(self, g: torch.Generator) -> tuple[Tensor, ...]:
        """Draw activations (n, p), neuron-major as in the package; each neuron has a mean."""
        x = torch.randn(self.p, self.n, generator=g, device=g.device)
        x += torch.randn(self.p, 1, generator=g, device=g.device)
        return (x.to(self.dtype).mT,)

    def labels(self, partition: int = 0) -> np.ndarray:
        """Return the cell of each neuron (p,), drawn at random; all cells have the same size."""
        return np.random.default_rng(partition).permutation(np.arange(self.p) % self.cells)


@dataclass(frozen=True)
class PlainCupy:
    """A formula computed by CuPy: tensors in and out by DLPack, on torch's stream."""

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
) -> KernelCase:
    """Return a row whose reference and plain routes use one formula.

    ``cost`` is (bytes, operations); ``facts`` are fields of the row that s does not determine.
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
    return KernelCase(name, shape, s.dtype, kernel=kernel, routes=routes, **facts)


def cast(xp: Any, dtype: str, *arrays: Any) -> list[Any]:
    """Convert arrays to the named dtype; arrays that already have it are not copied."""
    return [xp.asarray(a, dtype=getattr(xp, dtype)) for a in arrays]


def load(path: str, **options: Any) -> Callable[..., Any]:
    """Return repsim_kernels.kernels' function "module:name", imported on its first call."""
    module, _, name = path.partition(":")

    def call(*arguments: Any, **more: Any) -> Any:
        loaded = getattr(importlib.import_module(f"repsim_kernels.kernels.{module}"), name)
        return loaded(*arguments, **options, **more)

    return call
