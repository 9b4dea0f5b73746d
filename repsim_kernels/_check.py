"""The checks of every public argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repsim_kernels import _arrays, _options
from repsim_kernels._arrays import Array, Source
from repsim_kernels.errors import (
    CellError,
    ConstantError,
    DeviceError,
    DtypeError,
    LabelError,
    NonFiniteError,
    RepsimError,
    ShapeError,
)

_LARGEST = 1e70
# More units than any layer has; the Gram matrices of that many cells fit no memory.
_MOST_CELLS = 2**24
_ASYMMETRY = 1e-5  # what float32 products leave


def _real(a: Tensor) -> Tensor:
    """Return floating-point numbers as they are, integers and booleans as float64."""
    return a if a.is_floating_point() else a.double()


def wide(a: Tensor) -> Tensor:
    """Return float32 and float64 as they are, other dtypes as float64."""
    return a if a.dtype in (torch.float32, torch.float64) else a.double()


def _finite(a: Tensor, name: str, limit: float = _LARGEST) -> None:
    # The order of the elements does not matter here, and reductions are fastest over dense memory.
    dense = a.mT if a.ndim > 1 and not a.is_contiguous() else a
    # Below float64 all finite numbers are within the limit, and any other leaves no finite sum.
    if a.dtype != torch.float64 and math.isfinite(float(dense.sum())):
        return
    low, high = map(float, dense.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = ~a.isfinite()
        first = np.unravel_index(int(bad.flatten().byte().argmax()), a.shape)
        raise NonFiniteError(
            f"{name}: {int(bad.sum())} of {a.numel()} values are NaN or infinite (the first at "
            f"index {tuple(map(int, first))}); expected finite numbers"
        )
    largest = max(-low, high)
    if largest > limit or 0 < largest < 1 / limit:
        raise NonFiniteError(
            f"{name}: the largest magnitude is {largest:.3g}; expected between {1 / limit:g} and "
            f"{limit:g}, where squares of Gram matrices fit float64 (rescale it)"
        )


def _constant(x: Tensor) -> bool:
    """Whether any matrix of x (…, n, p) has all rows equal; it seldom reads more than a corner."""
    n, p = x.shape[-2:]
    varies: Any = False
    start, rows, width = 0, min(n, 16), 16
    while start < p:
        block = x[..., :rows, start : start + width]
        varies = varies | (block != block[..., :1, :]).any((-2, -1))
        if bool(varies.all()):
            return False
        if rows < n:
            rows = n
        else:
            start, width = start + width, width * 4
    return True


def representation(
    x: Any,
    name: str = "x",
    *,
    least: int = 2,
    constant: bool = False,
    batch: bool = True,
    batched: Any = False,
    later: bool = False,
) -> tuple[Tensor, Source]:
    """Check one representation (n, p): n >= `least`, p >= 1, real, finite, not constant.

    batch: whether the operation takes batches (…, n, p).
    batched: whether the caller asks for one; without, more than two dimensions are refused, since
    they are nearly always activations (n, c, h, w) or (n, t, d) that have not been flattened.
    later: whether the result is NaN if any number is not finite, and goes through `defined`; then
    this reads few of them, or none.
    """
    batched = _options.flag(batched, "batched")
    x, source = _arrays.convert(x, name)
    if x.ndim < 2 or (x.ndim > 2 and not batched):
        expected = "(…, n, p)" if batched else "(n, p)"
        ways = ""
        if x.ndim > 2:
            ways = f"; pass {name}.flatten(1) (in NumPy {name}.reshape(len({name}), -1))"
            ways += ", or batched=True for a batch of (n, p)" if batch else ""
        raise ShapeError(
            f"{name}: shape {tuple(x.shape)}; expected {expected}: stimuli x neurons{ways}"
        )
    n, p = x.shape[-2:]
    if n < least:
        raise ShapeError(
            f"{name}: {n} stimuli in shape {tuple(x.shape)}; expected at least {least}"
        )
    if p < 1:
        raise ShapeError(f"{name}: no neurons in shape {tuple(x.shape)}; expected at least 1")
    if 0 in x.shape:
        raise ShapeError(f"{name}: an empty batch, shape {tuple(x.shape)}; expected at least 1")
    x = _real(x)
    later = later and x.dtype != torch.float64  # which has finite numbers beyond the limit
    if not later:
        _finite(x, name)
    if not constant and _constant(x):
        _finite(x, name)
        raise ConstantError(
            f"{name}: the representation is the same for every stimulus; expected at least two "
            "different rows, since a zero Gram matrix has no similarity"
        )
    return x, source


def matrices(
    a: Any, name: str, *, symmetric: bool, limit: float = _LARGEST
) -> tuple[Tensor, Source]:
    """Check finite real matrices (…, m, n); `symmetric`: square, and equal to their transposes."""
    a, source = _arrays.convert(a, name)
    return _matrices(a, name, symmetric, limit), source


def _matrices(a: Tensor, name: str, symmetric: bool, limit: float) -> Tensor:
    square = a.ndim >= 2 and a.shape[-2] == a.shape[-1]
    if a.ndim < 2 or 0 in a.shape or (symmetric and not square):
        expected = "(…, n, n)" if symmetric else "(…, m, n)"
        raise ShapeError(f"{name}: shape {tuple(a.shape)}; expected {expected}, none of them empty")
    a = _real(a)
    _finite(a, name, limit)
    if symmetric:
        apart, size = (t.abs().amax((-2, -1)) for t in (a - a.mT, a))
        wrong = apart > size * _ASYMMETRY
        if bool(wrong.any()):
            raise ShapeError(
                f"{name}: {int(wrong.sum())} matrices differ from their transposes by more than "
                f"{_ASYMMETRY:g} of their largest entry; expected symmetric ones"
            )
    return a


def gram_and_parts(gram: Any, parts: Any, *, least: int) -> tuple[Tensor, Tensor, Source]:
    """Check a Gram matrix (n, n), n >= `least`, and those of its parts (C, n, n)."""
    gram, source = matrices(gram, "gram", symmetric=True, limit=_LARGEST**2)
    n = gram.shape[-1]
    if gram.ndim != 2 or n < least:
        raise ShapeError(
            f"gram: shape {tuple(gram.shape)}; expected (n, n) with at least {least} stimuli"
        )
    parts, parts_source = _arrays.convert(parts, "parts")
    if parts.ndim != 3 or tuple(parts.shape[1:]) != (n, n):
        raise ShapeError(f"parts: shape {tuple(parts.shape)}; expected (C, {n}, {n}), like gram")
    _same_place(source, parts_source, "gram", "parts")
    if len(parts):
        parts = _matrices(parts, "parts", symmetric=True, limit=_LARGEST**2)
    if _constant(gram):
        raise ConstantError(
            "gram: the same for every stimulus; expected a Gram matrix that is not constant, "
            "since centred it has no similarity to anything"
        )
    return gram, parts, source


def _same_place(a: Source, b: Source, name_a: str, name_b: str) -> None:
    if a != b:
        raise DeviceError(
            f"{name_b}: a {b.kind} array on {b.device}, but {name_a} is a {a.kind} array on "
            f"{a.device}; expected both of one library on one device"
        )


def pair(
    x: Any, y: Any, *, least: int = 2, batched: Any = False, later: bool = False
) -> tuple[Tensor, Tensor, Source]:
    """Check two representations of the same stimuli, (n, p) and (n, q); batches if `batched`."""
    x, source = representation(x, "x", least=least, batched=batched, later=later)
    y, y_source = representation(y, "y", least=least, batched=batched, later=later)
    _same_place(source, y_source, "x", "y")
    _same_stimuli(x, y, "x", "y")
    try:
        np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError:
        raise ShapeError(
            f"y: batch dimensions {tuple(y.shape[:-2])}, but x has {tuple(x.shape[:-2])}; expected "
            "shapes that broadcast"
        ) from None
    return x, y, source


def _same_stimuli(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    if a.shape[-2] != b.shape[-2]:
        raise ShapeError(
            f"{name_b}: {b.shape[-2]} stimuli, but {name_a} has {a.shape[-2]}; expected the same "
            "stimuli in the same order"
        )


def representations(
    xs: Any,
    name: str,
    *,
    least: int = 2,
    like: tuple[Tensor, Source] | None = None,
    later: bool = False,
) -> tuple[list[Tensor], Source]:
    """Check a sequence of representations (n, p_i) of the same stimuli (those of `like`)."""
    if isinstance(xs, Mapping):
        raise ShapeError(
            f"{name}: {type(xs).__name__}; expected a list of arrays (n, p_i): pass "
            f"list({name}.values())"
        )
    try:
        items = list(xs)
    except Exception:  # RuntimeError of tensors that have no rows, or a class of the caller's
        raise ShapeError(
            f"{name}: {type(xs).__name__}; expected a list of arrays (n, p_i)"
        ) from None
    if not items:
        raise ShapeError(f"{name}: an empty list; expected at least one array (n, p)")
    checked = [
        representation(x, f"{name}[{i}]", least=least, batch=False, later=later)
        for i, x in enumerate(items)
    ]
    (first, source), first_name = (checked[0], f"{name}[0]") if like is None else (like, "xs[0]")
    for i, (x, x_source) in enumerate(checked):
        _same_place(source, x_source, first_name, f"{name}[{i}]")
        _same_stimuli(first, x, first_name, f"{name}[{i}]")
    return [x for x, _ in checked], source


def numbers(a: Any, name: str) -> Tensor:
    """Check an array of finite real numbers."""
    found = _real(_arrays.convert(a, name)[0])
    if found.numel():
        _finite(found, name)
    return found


def integers(a: Any, name: str, error: type[RepsimError]) -> np.ndarray[Any, Any]:
    """Check an array of integers or booleans, as NumPy's; floats are refused, even whole ones."""
    tensor, _ = _arrays.convert(a, name, "integers (of 8 to 64 bits)")
    values: np.ndarray[Any, Any] = _arrays.to_numpy(tensor)
    if values.dtype.kind not in "iub" and values.size:
        raise DtypeError(f"{name}: dtype {_arrays.dtype_name(tensor)}; expected integers")
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        raise error(f"{name}: {values.max()} does not fit a signed 64-bit integer")
    return values


def cells(
    cells: Any, p: int, n_cells: int | None = None, *, partitions: bool = False
) -> tuple[np.ndarray[Any, Any], int]:
    """Check cells of p neurons: labels (p,) as int64, or a boolean membership (C, p).

    ``partitions``: labels (T, p) as well.
    """
    values = integers(cells, "cells", CellError)
    if n_cells is not None:
        n_cells = _options.count(n_cells, "n_cells", 0, _MOST_CELLS, CellError)
    if values.dtype.kind == "b" and values.ndim == 2:
        if values.shape[1] != p:
            raise CellError(
                f"cells: a membership of shape {values.shape}; expected (C, {p}), p of x"
            )
        if n_cells is not None and n_cells != len(values):
            raise CellError(f"n_cells: {n_cells}, but cells has {len(values)} rows")
        return values, len(values)
    several = partitions and values.ndim == 2 and len(values)
    more = f", or partitions as integers (T, {p})" if partitions else ""
    if values.shape[-1:] != (p,) or not (several or values.ndim == 1):
        raise CellError(
            f"cells: shape {values.shape}, dtype {values.dtype}; expected integer labels ({p},), "
            f"one for each neuron of x, or a boolean membership (C, {p}){more}"
        )
    if values.dtype.kind == "b":
        raise CellError(
            f"cells: boolean labels ({p},); expected integers, or a membership (C, {p})"
        )
    labels = values.astype(np.int64, copy=False)
    low, high = int(labels.min()), int(labels.max())
    most = _MOST_CELLS if n_cells is None else n_cells
    if low < -1 or high >= most:
        wrong = low if low < -1 else high
        expected = f"0 … {most - 1}, or -1 for no cell" if most else "-1 alone, as n_cells is 0"
        raise CellError(f"cells: label {wrong} is out of range; expected {expected}")
    return labels, max(high + 1, 0) if n_cells is None else n_cells


def _one_per_stimulus(labels: Any, n: int, name: str) -> np.ndarray[Any, Any]:
    values = integers(labels, name, LabelError)
    if values.shape != (n,):
        raise LabelError(
            f"{name}: shape {values.shape}; expected ({n},), one for each stimulus of x"
        )
    return values.astype(np.int64)


_ABSENT: Any = object()


def labels(labels: Any, n: int, target: Any = _ABSENT) -> np.ndarray[Any, Any]:
    """Check class labels (n,), and that `target`, if given, is one class of at least two."""
    values = _one_per_stimulus(labels, n, "labels")
    present = np.unique(values)
    if target is not _ABSENT:
        if isinstance(target, (bool, np.bool_)) or not isinstance(target, (int, np.integer)):
            raise LabelError(f"target: {_options.shown(target)}; expected an integer label")
        if target not in present:
            some = ", ".join(str(v) for v in present[:10])
            raise LabelError(
                f"target: no stimulus has label {_options.shown(target)}; labels has {some}"
            )
    if len(present) < 2:
        raise LabelError(f"labels: only class {present[0]}; expected at least two classes")
    return values


def classes(
    labels: Any, n: int, n_classes: int | None, name: str = "labels"
) -> tuple[np.ndarray[Any, Any], int]:
    """Check class labels 0 … k - 1 (n,), each class with a stimulus."""
    values = _one_per_stimulus(labels, n, name)
    k = int(values.max()) + 1
    if n_classes is not None:
        k = _options.count(n_classes, "n_classes", error=LabelError)
    if values.min() < 0 or values.max() >= k:
        found = f"{name}: values {values.min()} … {values.max()}"
        if n_classes is None:
            raise LabelError(f"{found}; expected integers from 0 on")
        raise LabelError(f"{found}, n_classes {k}; expected them in 0 … n_classes - 1")
    present = np.unique(values)  # a count of each class up to the largest may fit no memory
    if len(present) < k:
        empty = int(np.append(present != np.arange(len(present)), True).argmax())
        raise LabelError(f"{name}: class {empty} has no stimulus; expected every class 0 … {k - 1}")
    return values, k


NO_CKA = (
    "x or y: nothing is left of its kernel matrix after centring (all stimuli are equally far "
    "apart), or the median distance is 0 and 'rbf' has no bandwidth; expected distances that differ"
)
NO_RSA = (
    "x or y: its distances are all equal, or (for 'correlation' and 'cosine') a stimulus is "
    "constant or zero; expected distances that differ"
)


def defined(value: Array, why: str, **arguments: Tensor) -> Array:
    """Give a result back, or raise where it is not defined.

    NonFiniteError, for one of the arguments that were to be checked `later`, or ConstantError.
    """
    if bool((value != value).any()):
        for name, argument in arguments.items():
            _finite(argument, name)
        raise ConstantError(why)
    return value


def reached(distances: Array, a: Tensor, name: str) -> None:
    """Check an argument that was to be checked `later`, where no distance shows it finite.

    Distances (…, C) are NaN or 0 where it has a number that is not.
    """
    if not bool((distances > 0).any(-1).all()):
        _finite(a, name)
