"""Gram matrices of the stimuli, for all neurons and by cell; and centring, for all metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels._cell_sets import Cells, are_partitions, to_dense

Real = NDArray[Any]
Array = NDArray[np.float64]


def centre(x: Real) -> Array:
    """Subtract the mean of each column of x (n, p)."""
    a = subtract_first_row(x)
    a -= a.mean(axis=0)
    return a


def subtract_first_row(x: Real) -> Array:
    """Subtract the first row of x (n, p), so that a constant column becomes exactly zero."""
    a: Array = np.array(x, dtype=np.float64)
    a -= a[0]
    return a


def contrasts(n: int) -> Array:
    """Return Helmert's orthonormal basis of the complement of the ones vector, (n, n - 1).

    ``contrasts(n).T @ x`` has the inner products of the centred x's columns, in n - 1 dimensions.
    """
    k = np.arange(1, n)
    q = np.triu(np.ones((n, n - 1)))
    q[k, k - 1] = -k
    return q / np.sqrt(k * (k + 1.0))


def squared_distances(x: Real) -> Array:
    """Return the squared Euclidean distances between the rows of x, (n, n)."""
    a = np.asarray(x, dtype=np.float64)
    return np.array([((a - row) ** 2).sum(axis=1) for row in a])


def centered_gram(x: Real, *, kernel: str = "linear", sigma: float | None = None) -> Array:
    """Return the Gram matrix of the stimuli, (n, n), centred in feature space.

    ``"linear"``: inner products of the rows of the centred x. ``"rbf"``: exp(-d² / 2b²), centred on
    both sides, where b² is sigma² times the median of all n² squared distances d²
    (Kornblith et al. 2019).
    """
    if kernel == "linear":
        a = centre(x)
        return a @ a.T
    d2 = squared_distances(x)
    bandwidth2 = (1.0 if sigma is None else sigma) ** 2 * np.median(d2)
    return double_centre(np.exp(-d2 / (2 * bandwidth2)))


def double_centre(k: Real) -> Array:
    """Subtract the means of the rows and the columns of a kernel matrix (n, n)."""
    return centre(centre(k).T)


def membership(cells: Cells, n_cells: int | None = None) -> NDArray[np.bool_]:
    """Return which neurons each cell has, (C, p), from labels (p,) or from a membership.

    For labels of T partitions (T, p) the result is (T, C, p).
    """
    cells = to_dense(cells)
    if cells.dtype == np.bool_:
        return cells
    count = cells.max(initial=-1) + 1 if n_cells is None else n_cells
    return np.asarray(cells[..., None, :] == np.arange(count)[:, None])


def cell_grams(x: Real, cells: Cells, *, n_cells: int | None = None) -> Array:
    """Return the Gram of each cell's centred columns, (C, n, n), or (T, C, n, n) for (T, p)."""
    if are_partitions(cells):
        return np.stack([cell_grams(x, labels, n_cells=n_cells) for labels in cells])
    a = centre(x)
    members = membership(cells, n_cells)
    grams = np.zeros((len(members), len(a), len(a)))
    for gram, cell in zip(grams, members, strict=True):
        gram[:] = a[:, cell] @ a[:, cell].T
    return grams
