"""The metrics from their definitions in NumPy's long double, the oracle for accuracy.

Nothing here is shared with the package. On x86 a long double has 19 digits; on some machines it is
a float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
REAL = np.longdouble


def centre(x: Array) -> Array:
    """Subtract the features' means, in long double; the input values count as exact."""
    z = np.asarray(x).astype(REAL)
    return z - z.mean(0)


def compute_gram(x: Array) -> Array:
    z = centre(x)
    return z @ z.T


def compute_similarities(x: Array, y: Array) -> dict[str, float]:
    """Return all similarities of representations (n, p) and (n, q)."""
    k, m = compute_gram(x), compute_gram(y)
    return {
        "cka": float(cka(k, m)),
        "cka_debiased": float(cka_debiased(k, m)),
        "procrustes": procrustes(x, y),
        "rsa": float(rsa(k, m)),
    }


def compute_distances(x: Array, cells: Array) -> dict[str, Array]:
    """Return distances from x (n, p) to x without each of its cells (p,).

    1 - similarity, for Procrustes 2 - 2 · similarity. At least n - 1 neurons must remain.
    """
    z = centre(x)
    whole = z @ z.T
    parts = [z[:, cells == c] for c in range(cells.max() + 1)]
    rest = [whole - part @ part.T for part in parts]  # long doubles keep enough digits here
    return {
        "cka": np.array([float(1 - cka(whole, k)) for k in rest]),
        "cka_debiased": np.array([float(1 - cka_debiased(whole, k)) for k in rest]),
        "procrustes": _procrustes_distances(whole, rest),
    }


def cka(k: Array, m: Array) -> Any:
    """Return CKA of two Gram matrices, in their precision (as do the next two functions)."""
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def cka_debiased(k: Array, m: Array) -> Any:
    n, k, m = len(k), k.copy(), m.copy()
    for g in (k, m):
        np.fill_diagonal(g, 0)

    def hsic(a: Array, b: Array) -> Any:
        grand, cross = a.sum() * b.sum(), a.sum(0) @ b.sum(0)
        return (a * b).sum() + grand / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)

    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def rsa(k: Array, m: Array) -> Any:
    """Return Pearson's correlation of squared Euclidean distances."""
    pairs = np.triu_indices(len(k), 1)
    a, b = (np.add.outer(g.diagonal(), g.diagonal())[pairs] - 2 * g[pairs] for g in (k, m))
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


def procrustes(x: Array, y: Array) -> float:
    """Return the similarity; LAPACK computes it, so the last digit or two are float64's."""
    a, b = (z.astype(np.float64) for z in map(centre, (x, y)))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.linalg.svd(a.T @ b, compute_uv=False).sum())


def _procrustes_distances(whole: Array, rest: list[Array]) -> Array:
    basis = _complement(len(whole))
    factor = _cholesky(basis.T @ whole @ basis)
    values = []
    for k in rest:
        total = _trace_of_root(factor.T @ (basis.T @ k @ basis) @ factor)
        values.append(float(2 - 2 * total / np.sqrt(np.trace(whole) * np.trace(k))))
    return np.array(values)


def _complement(n: int) -> Array:
    """Return an orthonormal basis (n, n - 1) of the complement of the ones vector (Helmert)."""
    j = np.arange(1, n, dtype=REAL)
    rows = np.arange(n)[:, None]
    return (np.where(rows < j, REAL(1), 0) - np.where(rows == j, j, 0)) / np.sqrt(j * (j + 1))


def _cholesky(a: Array) -> Array:
    a, out = a.copy(), np.zeros_like(a)
    for j in range(len(a)):
        out[j:, j] = a[j:, j] / np.sqrt(a[j, j])
        a[j:, j:] -= np.outer(out[j:, j], out[j:, j])
    return out


def _trace_of_root(m: Array) -> Any:
    """Return the trace of a matrix square root, from float64 and two Newton steps."""
    w, u = np.linalg.eigh(m.astype(np.float64))
    root, s = (u * np.sqrt(w)).astype(REAL) @ u.T.astype(REAL), np.sqrt(w)
    for _ in range(2):
        off = (m - root @ root).astype(np.float64)
        root = root + u @ ((u.T @ off @ u) / np.add.outer(s, s)) @ u.T
    return np.trace(root)
