"""Comparison of RDMs."""

from __future__ import annotations

import numpy as np

from repsim_kernels.reference.gram import Array, Real


def compare_rdms(a: Real, b: Real, *, method: str = "spearman") -> Array:
    """Compare condensed RDMs (…, N) with others (…, N), by the definitions.

    NaN where a comparison is not defined. "kendall" takes N² operations and "whitened" N² memory.
    """
    shape = a.shape[:-1] + b.shape[:-1]
    compare = _METHODS[method]
    rows, columns = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (a, b))
    return np.array([[compare(u, v) for v in columns] for u in rows]).reshape(shape)


def _compute_cosine(u: Array, v: Array) -> np.float64:
    return np.float64(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def _compute_pearson(u: Array, v: Array) -> np.float64:
    if np.ptp(u) == 0 or np.ptp(v) == 0:
        return np.float64(np.nan)
    return _compute_cosine(u - u.mean(), v - v.mean())


def _compute_spearman(u: Array, v: Array) -> np.float64:
    return _compute_pearson(_rank(u), _rank(v))


def _compute_rho_a(u: Array, v: Array) -> np.float64:
    """Return the mean of Spearman's correlation over all ways of ordering equal values."""
    n = len(u)
    r, s = (_rank(x) - (n + 1) / 2 for x in (u, v))
    return np.float64(12 * (r @ s) / (n**3 - n))


def _compute_kendall(u: Array, v: Array) -> np.float64:
    """Return τ-a: concordant less discordant pairs of entries, over the number of all pairs."""
    n = len(u)
    total = sum(np.sign(u[i] - u[:i]) @ np.sign(v[i] - v[:i]) for i in range(n))
    return np.float64(total / (n * (n - 1) / 2))


def _compute_whitened(u: Array, v: Array) -> np.float64:
    """Return the cosine of V^(-1/2) u and V^(-1/2) v, where V ∝ the covariance of the entries.

    V holds the squares of the entries of C Cᵀ, and C has a row for each pair of conditions, with 1
    for the first and -1 for the second (Diedrichsen et al. 2021).
    """
    n = round((1 + np.sqrt(1 + 8 * len(u))) / 2)
    i, j = np.triu_indices(n, 1)
    contrasts = np.eye(n)[i] - np.eye(n)[j]
    covariance = (contrasts @ contrasts.T) ** 2
    whitened = np.linalg.solve(covariance, np.stack([u, v], axis=1))
    return np.float64(u @ whitened[:, 1] / np.sqrt((u @ whitened[:, 0]) * (v @ whitened[:, 1])))


def _rank(values: Array) -> Array:
    """Rank values from 1; equal values get their mean rank."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


_METHODS = {
    "spearman": _compute_spearman,
    "pearson": _compute_pearson,
    "cosine": _compute_cosine,
    "kendall": _compute_kendall,
    "rho-a": _compute_rho_a,
    "whitened": _compute_whitened,
}
