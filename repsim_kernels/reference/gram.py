"""Gram matrices of the stimuli, whole and by cell, and the centring that every metric uses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Real = NDArray[Any]
Array = NDArray[np.float64]


def centered(x: Real) -> Array:
    """x minus the mean of each column, (n, p)."""
    a = shifted(x)
    a -= a.mean(axis=0)
    return a


def shifted(x: Real) -> Array:
    """x minus its first row, (n, p): a column that is constant comes out as exact zeros."""
    a: Array = np.array(x, dtype=np.float64)
    a -= a[0]
    return a


def contrasts(n: int) -> Array:
    """Orthonormal basis of what is orthogonal to the ones vector, (n, n - 1): Helmert's.

    ``contrasts(n).T @ x`` holds all that is in the centred x, and has no null direction.
    """
    k = np.arange(1, n)
    q = np.triu(np.ones((n, n - 1)))
    q[k, k - 1] = -k
    return q / np.sqrt(k * (k + 1.0))


def squared_distances(x: Real) -> Array:
    """Squared Euclidean distances of the rows, (n, n)."""
    a = np.asarray(x, dtype=np.float64)
    return np.array([((a - row) ** 2).sum(axis=1) for row in a])


def centered_gram(x: Real, *, kernel: str = "linear", sigma: float | None = None) -> Array:
    """Gram matrix of the stimuli, (n, n), centred in feature space.

    ``"linear"``: inner products of the rows of the centred x. ``"rbf"``: exp(-d² / 2b²) with b²
    sigma² times the median of all n² squared distances d² (Kornblith et al. 2019), centred on
    both sides.
    """
    if kernel == "linear":
        a = centered(x)
        return a @ a.T
    d2 = squared_distances(x)
    bandwidth2 = (1.0 if sigma is None else sigma) ** 2 * np.median(d2)
    return centered(centered(np.exp(-d2 / (2 * bandwidth2))).T)


def membership(cells: Real, n_cells: int | None = None) -> NDArray[np.bool_]:
    """Which neurons each cell has, (C, p), from that itself or from a label a neuron (p,)."""
    if cells.dtype == np.bool_:
        return cells
    count = cells.max(initial=-1) + 1 if n_cells is None else n_cells
    return np.asarray(cells == np.arange(count)[:, None])


def cell_grams(x: Real, cells: Real, *, n_cells: int | None = None) -> Array:
    """Gram matrix of each cell's centred columns, (C, n, n); of partitions (T, p) T times."""
    if cells.ndim == 2 and cells.dtype != np.bool_:
        return np.stack([cell_grams(x, labels, n_cells=n_cells) for labels in cells])
    a = centered(x)
    members = membership(cells, n_cells)
    grams = np.zeros((len(members), len(a), len(a)))
    for gram, cell in zip(grams, members, strict=True):
        gram[:] = a[:, cell] @ a[:, cell].T
    return grams
