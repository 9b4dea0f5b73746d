"""Checks of the argument ``neighbours``: which voxels belong to the sphere around each centre."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels import _arrays, _check, _options
from repsim_kernels._cell_sets import SparseCells
from repsim_kernels._check_cells import is_csr_pair, is_scipy_sparse, normalize, read_scipy
from repsim_kernels.errors import CellError, DtypeError

_BLOCK = 2**20  # indices that are checked together, since there may be tens of millions
_EXPECTED = (
    "a list with the voxel indices of each sphere, or these as CSR: a SciPy CSR array, or "
    "(indptr, indices)"
)


def check_neighbours(neighbours: Any, p: int) -> SparseCells:
    """Check the neurons of spheres, in each of the accepted forms; p is the number of all neurons.

    Indices stay int32 if they are, and are not copied if they ascend within each sphere.
    """
    indptr, indices = _read(neighbours, p)
    if len(indptr) < 2:
        raise CellError(f"neighbours: no spheres; expected {_EXPECTED}")
    sizes = np.diff(indptr)
    if indptr[0] or indptr[-1] != len(indices) or (sizes < 0).any():
        raise CellError(
            f"neighbours: offsets ({len(indptr)},) that do not divide {len(indices)} indices among "
            f"spheres; expected (indptr, indices) with indptr from 0 to {len(indices)}, never "
            "falling (for two spheres, pass a list)"
        )
    if len(indices):
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= p:
            wrong = low if low < 0 else high
            raise CellError(f"neighbours: index {wrong} is out of range; expected 0 … {p - 1}")
    spheres = SparseCells(indptr, indices, p)
    return spheres if _ascend(spheres) else _sort(spheres)


def _read(neighbours: Any, p: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return offsets and indices, integers."""
    if is_scipy_sparse(neighbours):
        shape, indptr, indices = read_scipy(neighbours, "neighbours")
        if len(shape) != 2 or shape[1] != p:
            raise CellError(
                f"neighbours: a sparse {type(neighbours).__name__} of shape {shape}; expected "
                f"(C, {p}), a column for each voxel"
            )
        return indptr.astype(np.int64), indices
    if is_csr_pair(neighbours):
        indptr, indices = (
            _to_indices(part, f"neighbours[{i}]") for i, part in enumerate(neighbours)
        )
        return indptr.astype(np.int64, copy=False), indices
    is_text = isinstance(neighbours, (str, bytes))
    items = None if is_text else _options.to_tuple(neighbours)
    if items is None or (_arrays.count_dimensions(neighbours) == 1 and items and _is_flat(items)):
        raise CellError(f"neighbours: {_options.short_repr(neighbours)}; expected {_EXPECTED}")
    spheres = [_to_indices(item, f"neighbours[{i}]") for i, item in enumerate(items)]
    indptr = np.zeros(len(spheres) + 1, np.int64)
    np.cumsum([len(sphere) for sphere in spheres], out=indptr[1:])
    return indptr, np.concatenate([np.zeros(0, np.int32), *spheres])


def _is_flat(items: tuple[Any, ...]) -> bool:
    return _arrays.count_dimensions(items[0]) == 0


def _to_indices(values: Any, name: str) -> NDArray[Any]:
    """Check the indices of a sphere; int32 and int64 stay as they are."""
    # Hundreds of thousands of spheres are checked one by one.
    if not (isinstance(values, np.ndarray) and values.dtype in (np.int32, np.int64)):
        values = _check.check_integers(values, name, CellError)
        if values.dtype.kind == "b":
            raise DtypeError(f"{name}: dtype bool; expected the indices of voxels: np.flatnonzero")
        values = values.astype(np.int64)
    if values.ndim != 1:
        raise CellError(f"{name}: shape {values.shape}; expected the indices of voxels, (k,)")
    return values


def _ascend(spheres: SparseCells) -> bool:
    """Whether the indices of each sphere ascend, without duplicates."""
    for start in range(0, len(spheres.indices), _BLOCK):
        steps = np.diff(spheres.indices[start : start + _BLOCK + 1])
        falls = np.flatnonzero(steps <= 0) + start + 1
        if not (spheres.indptr[np.searchsorted(spheres.indptr, falls)] == falls).all():
            return False
    return True


def _sort(spheres: SparseCells) -> SparseCells:
    """Sort the indices of each sphere, and drop duplicates."""
    parts = [
        normalize(part.indptr, part.indices.astype(np.int64), part.p) for part in _split(spheres)
    ]
    sizes = np.concatenate([np.diff(part.indptr) for part in parts])
    indices = np.concatenate([part.indices.astype(spheres.indices.dtype) for part in parts])
    return SparseCells(np.concatenate([[0], np.cumsum(sizes)]), indices, spheres.p)


def _split(spheres: SparseCells) -> Iterator[SparseCells]:
    """Yield spheres in groups of about `_BLOCK` indices."""
    step = max(1, len(spheres) * _BLOCK // max(1, len(spheres.indices)))
    for start in range(0, len(spheres), step):
        yield spheres.select(slice(start, start + step))
