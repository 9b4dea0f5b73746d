"""Representational similarity analysis."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Array, Real, centered, squared_distances


def rsa(x: Real, y: Real, *, distance: str = "euclidean", compare: str = "spearman") -> np.float64:
    """Correlation of the n(n - 1)/2 distances between the rows of x (n, p) and of y (n, q).

    Distances as SciPy's ``pdist`` names them, between the rows as given; compared by their
    ``"pearson"`` or ``"spearman"`` correlation (ties get the average rank), or their
    ``"cosine"`` (Kriegeskorte et al. 2008).
    """
    u, v = distances(x, distance), distances(y, distance)
    if compare == "spearman":
        u, v = _ranks(u), _ranks(v)
    if compare != "cosine":
        u, v = u - u.mean(), v - v.mean()
    return np.float64(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def distances(x: Real, distance: str) -> Array:
    """The distances of all pairs of rows, (n(n - 1)/2,), in the order of the upper triangle."""
    pairs = np.triu_indices(len(x), 1)
    x = np.asarray(x, dtype=np.float64)
    if distance in ("euclidean", "sqeuclidean"):
        d2 = squared_distances(x)[pairs]
        return np.sqrt(d2) if distance == "euclidean" else d2
    rows = centered(x.T).T if distance == "correlation" else x
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    # 1 - cos of unit rows is half their squared distance, which is 0 for equal rows.
    return squared_distances(rows)[pairs] / 2


def _ranks(values: Array) -> Array:
    if np.isnan(values).any():
        return values  # a distance that is not defined has no rank
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
