"""Overlap of nearest neighbours between representations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repsim_kernels.reference.gram import Array, Real
from repsim_kernels.reference.rsa import PairDistances, pair_distances, rank_distances


def mutual_knn(x: Real, y: Real, *, k: int = 10, distance: str = "cosine") -> np.float64:
    """Return the mean share of its k nearest neighbours that a stimulus has in both x and y."""
    near_x, near_y = (find_nearest(z, k, distance) for z in (x, y))
    share = (near_x & near_y).sum(1).mean() / k
    return np.float64(share if near_x.any() and near_y.any() else np.nan)


def jaccard_knn(x: Real, y: Real, *, k: int = 10, distance: str = "cosine") -> np.float64:
    """Return the mean over stimuli of shared neighbours over neighbours in x or y."""
    near_x, near_y = (find_nearest(z, k, distance) for z in (x, y))
    shares = (near_x & near_y).sum(1) / (near_x | near_y).sum(1)
    return np.float64(shares.mean() if near_x.any() and near_y.any() else np.nan)


def cknna(x: Real, y: Real, *, k: int = 10) -> np.float64:
    """Return CKA over the pairs (i, j) in which j is a neighbour of i in both x and y.

    The kernel has the products of rows of unit length, minus the mean of each row
    (Huh et al. 2024, equations 12 and 16 to 18).
    """
    near_x, near_y = (find_nearest(z, k, "cosine") for z in (x, y))
    kernel_x, kernel_y = (centre_rows(z) for z in (x, y))

    def align(a: Array, b: Array, mask: NDArray[Any]) -> Any:
        return (a * b)[mask].sum()

    xx, yy = align(kernel_x, kernel_x, near_x), align(kernel_y, kernel_y, near_y)
    if min(xx, yy) < 1e-28 * k * len(x):
        return np.float64(np.nan)
    return np.float64(align(kernel_x, kernel_y, near_x & near_y) / np.sqrt(xx * yy))


def centre_rows(x: Real) -> Array:
    """Return the products of the rows of x, scaled to unit length, minus the mean of each row."""
    rows = np.asarray(x, dtype=np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    kernel: Array = rows @ (rows - rows.mean(axis=0)).T
    return kernel


def find_nearest(x: Real, k: int, distance: str) -> NDArray[np.bool_]:
    """Return which stimuli (n, n) are among the k nearest others of each row.

    The distances from one stimulus tie as in `rank_distances`; tied ones count in the order of
    their indices. All False if a distance is not defined, or those from the first stimulus are 0.
    """
    n = len(x)
    near = np.zeros((n, n), dtype=np.bool_)
    pairs = pair_distances(x, distance)
    positive = pairs.values[: n - 1] > pairs.tolerances[: n - 1]
    if np.isnan(pairs.values).any() or not positive.any():
        return near
    square = [_to_square(part, n) for part in pairs]
    for i in range(n):
        others = np.flatnonzero(np.arange(n) != i)
        ranks = rank_distances(PairDistances(*(part[i, others] for part in square)))
        near[i, others[np.argsort(ranks, kind="stable")[:k]]] = True
    return near


def _to_square(values: Array, n: int) -> Array:
    square = np.zeros((n, n))
    square[np.triu_indices(n, 1)] = values
    return square + square.T
