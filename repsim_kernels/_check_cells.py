"""Checks of the argument ``cells``, in each of the forms that public functions accept."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels import _arrays, _check, _options
from repsim_kernels._cell_sets import Cells as Cells
from repsim_kernels._cell_sets import SparseCells as SparseCells
from repsim_kernels._cell_sets import are_partitions as are_partitions
from repsim_kernels.errors import CellError, DtypeError

_MAX_CELLS = 2**24  # more than any layer has neurons, and more Gram matrices than fit in memory


def check_cells(
    cells: Any,
    p: int,
    n_cells: int | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    allow_partitions: bool = False,
) -> tuple[Cells, int]:
    """Check cells of p neurons; return them, and their number C.

    The result is int64 labels (p,), a boolean membership (C, p), `SparseCells`, or, with
    `allow_partitions`, int64 labels (T, p).

    Cells may also be one boolean mask, which is a membership of one cell. Labels and one mask may
    have the shape of one stimulus' activation, or broadcast to it. That shape is `shape`; if it is
    None, any shape of p neurons is accepted, and one run of 1s stands for the missing dimensions.
    """
    if n_cells is not None:
        n_cells = _options.check_count(n_cells, "n_cells", 0, _MAX_CELLS, CellError)
    if (sparse := _convert_sparse(cells, p)) is not None:
        _check_rows(len(sparse), n_cells)
        return sparse, len(sparse)
    values = _check.check_integers(cells, "cells", CellError)
    is_mask = values.dtype.kind == "b"
    if (
        values.ndim == 2
        and values.shape[1] == p
        and (is_mask or (allow_partitions and len(values)))
    ):
        spread = values
    else:
        spread = _spread(values, p, shape, allow_partitions)
    if is_mask:
        spread = spread.reshape(-1, p)
        _check_rows(len(spread), n_cells)
        return spread, len(spread)
    labels = spread.astype(np.int64, copy=False)
    low, high = int(labels.min()), int(labels.max())
    limit = _MAX_CELLS if n_cells is None else n_cells
    if low < -1 or high >= limit:
        wrong = low if low < -1 else high
        expected = f"0 … {limit - 1}, or -1 for no cell" if limit else "only -1, as n_cells is 0"
        raise CellError(f"cells: label {wrong} is out of range; expected {expected}")
    return labels, max(high + 1, 0) if n_cells is None else n_cells


def _check_rows(rows: int, n_cells: int | None) -> None:
    """Check that a membership has n_cells rows, if that is given."""
    if n_cells is not None and n_cells != rows:
        raise CellError(f"n_cells: {n_cells}, but cells has {rows} rows; expected {rows}")


def _spread(
    values: NDArray[Any], p: int, shape: tuple[int, ...] | None, allow_partitions: bool
) -> NDArray[Any]:
    """Return the value of each neuron, (p,), of labels or of a mask that may need broadcasting."""
    if values.shape == (p,):
        return values
    size = math.prod(values.shape)
    if size < min(2, p):  # a single value would be one cell of all neurons, or an empty array
        raise _shape_error(values, p, shape, allow_partitions)
    if shape is not None:
        try:
            return np.broadcast_to(values, shape).flatten()
        except ValueError:
            raise _shape_error(values, p, shape, allow_partitions) from None
    if size == p and values.ndim > 1:
        return values.reshape(p)
    runs = [list(group) for length, group in itertools.groupby(values.shape) if length == 1]
    if values.ndim < 2 or not runs:
        raise _shape_error(values, p, None, allow_partitions)
    if len(runs) > 1 or p % size:
        reason = (
            f"{p} neurons are not a multiple of {size}"
            if len(runs) == 1
            else f"any of {len(runs)} places could be broadcast to {p} neurons"
        )
        raise CellError(
            f"cells: shape {values.shape}, but {reason}; expected a shape that broadcasts in one "
            "place: pass np.broadcast_to(cells, shape) for the shape of one stimulus' activation, "
            "or for channels rk.cells.channels(shape)"
        )
    first = values.shape.index(1)
    before = math.prod(values.shape[:first])
    return np.broadcast_to(
        values.reshape(before, 1, size // before), (before, p // size, size // before)
    ).flatten()


def _shape_error(
    values: NDArray[Any], p: int, shape: tuple[int, ...] | None, allow_partitions: bool
) -> CellError:
    """Return the error for cells of a shape that fits in no way."""
    if values.dtype.kind == "b" and values.ndim == 2 and shape is None:
        return CellError(
            f"cells: a membership of shape {values.shape}; expected (C, {p}), a column for each "
            "neuron"
        )
    broadcast = (
        f", both also in shapes that broadcast to {shape}" if shape and len(shape) > 1 else ""
    )
    partitions = f", or partitions as integers (T, {p})" if allow_partitions else ""
    return CellError(
        f"cells: shape {values.shape}, dtype {values.dtype}; expected integer labels ({p},), one "
        f"for each neuron, or a boolean mask ({p},){broadcast}, or a membership (C, {p}), boolean "
        f"or sparse: a SciPy CSR array, or (indptr, indices){partitions}"
    )


def _convert_sparse(cells: Any, p: int) -> SparseCells | None:
    """Return checked sparse cells, or None for anything that is not a sparse membership."""
    shape: tuple[int, ...]
    indptr: NDArray[Any]
    if isinstance(cells, SparseCells):
        shape, indptr, indices = (len(cells), cells.p), cells.indptr, cells.indices
    elif is_scipy_sparse(cells):
        shape, indptr, indices = read_scipy(cells, "cells")
    elif is_csr_pair(cells):
        indptr, indices = (
            _check.check_integers(part, f"cells[{i}]", CellError) for i, part in enumerate(cells)
        )
        shape = (len(indptr) - 1, p)
    else:
        return None
    if len(shape) != 2 or shape[1] != p:
        raise CellError(
            f"cells: a sparse membership of shape {shape}; expected (C, {p}), a column for each "
            "neuron"
        )
    return normalize(indptr.astype(np.int64), indices.astype(np.int64), p)


def is_scipy_sparse(cells: Any) -> bool:
    """Whether cells are a sparse array of SciPy's."""
    # On the type, as in `_arrays`, since a DataFrame may have any columns.
    return hasattr(type(cells), "nnz") and hasattr(cells, "tocsr")


def is_csr_pair(cells: Any) -> bool:
    """Whether cells are a tuple of two vectors, offsets and neurons."""
    return (
        isinstance(cells, tuple)
        and len(cells) == 2
        and all(_arrays.count_dimensions(part) == 1 for part in cells)
    )


def read_scipy(cells: Any, name: str) -> tuple[tuple[int, ...], NDArray[Any], NDArray[Any]]:
    """Return the shape, offsets and neurons of a sparse membership, without zeros it stores."""
    csr = cells if cells.format == "csr" else cells.tocsr()
    data = np.asarray(csr.data)
    wrong = (data != 0) & (data != 1)
    if wrong.any():
        raise DtypeError(
            f"{name}: a sparse {type(cells).__name__} with the value {data[wrong.argmax()]}; "
            "expected a membership: booleans, or 0 and 1"
        )
    indptr, indices = csr.indptr, csr.indices
    if not data.all():
        indptr = np.concatenate([[0], np.cumsum(data != 0)])[indptr]
        indices = indices[data != 0]
    return tuple(csr.shape), indptr, indices


def normalize(indptr: NDArray[np.int64], indices: NDArray[np.int64], p: int) -> SparseCells:
    """Check offsets and neurons, and sort each cell's neurons, without duplicates."""
    sizes = np.diff(indptr)
    if not len(indptr) or indptr[0] or indptr[-1] != len(indices) or (sizes < 0).any():
        raise CellError(
            f"cells: offsets ({len(indptr)},) that do not divide {len(indices)} neurons among "
            f"cells; expected (indptr, indices) with indptr from 0 to {len(indices)}, never "
            "falling (for two partitions, pass an array or a list)"
        )
    wrong = (indices < 0) | (indices >= p)
    if wrong.any():
        raise CellError(
            f"cells: neuron {indices[wrong.argmax()]} is out of range; expected 0 … {p - 1}"
        )
    rows = np.repeat(np.arange(len(sizes)), sizes)
    steps, same_row = np.diff(indices), rows[1:] == rows[:-1]
    if (same_row & (steps <= 0)).any():
        keys = np.sort(rows * p + indices)  # np.unique would take ten times as long
        keys = keys[np.diff(keys, prepend=-1) > 0]
        rows, indices = keys // p, keys % p
        sizes = np.bincount(rows, minlength=len(sizes))
    return SparseCells(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), indices, p)
